"""Text in and out of a model: chat templates, tokenizing, incremental detokenizing, stop strings, reasoning."""

from server.text.detokenize import IncrementalDetokenizer
from server.text.model_text import ModelText, load_text
from server.text.reasoning import ReasoningSplitter
from server.text.stop_strings import StopStrings

__all__ = ["IncrementalDetokenizer", "ModelText", "ReasoningSplitter", "StopStrings", "load_text"]
