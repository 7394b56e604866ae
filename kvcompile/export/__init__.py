"""An artifact -> another system: plans as its files (`plans`), and whole models as ONNX (`export.onnx`)."""

from kvcompile.export.plans import EXPORTS, Export, Exporter, export, register, write

__all__ = ["EXPORTS", "Export", "Exporter", "export", "register", "write"]
