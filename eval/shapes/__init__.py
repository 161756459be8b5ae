"""The embedded suite: generated scenes, six data sets, and a tiny LLaVA trained on such scenes.

The data sets have the schemas of the real ones. The suite is a demonstration and a test bed; its
scores say nothing about any published model.
"""
