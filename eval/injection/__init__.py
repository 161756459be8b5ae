"""Put a pruner into a Hugging Face vision-language model for the length of a `with` block."""

from secateur.injection.audit import SampleRecord
from secateur.injection.calls import Sample, Trace
from secateur.injection.session import inject

__all__ = ["Sample", "SampleRecord", "Trace", "inject"]
