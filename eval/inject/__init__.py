"""Put a pruner into a Hugging Face vision-language model for the length of a `with` block."""

from eval.inject.session import Sample, SampleRecord, Trace, inject

__all__ = ["Sample", "SampleRecord", "Trace", "inject"]
