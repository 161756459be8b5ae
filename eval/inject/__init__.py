"""Put a pruner into a Hugging Face vision-language model for the length of a `with` block."""

from eval.inject.audit import SampleRecord
from eval.inject.calls import Sample, Trace
from eval.inject.session import inject

__all__ = ["Sample", "SampleRecord", "Trace", "inject"]
