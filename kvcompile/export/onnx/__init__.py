"""A model with its budgeted cache as ONNX, standard operators alone. Needs the package `onnx` (`kvcompile[onnx]`)."""

from kvcompile.export.onnx.write import Exported, export

__all__ = ["Exported", "export"]
