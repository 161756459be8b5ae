"""The embedded suite: generated scenes, six data sets in the schemas of the real ones, a tiny LLaVA trained on them.

A demonstration and a test bed. Its scores say nothing about any published model.
"""
