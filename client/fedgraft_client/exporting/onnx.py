"""One ONNX file of backbone, adapter and head, compared with the model before it is kept.

The number of records is free; everything else has the size of the prepared inputs. How raw records
are prepared, and what the outputs mean, is written into the file's metadata as JSON.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedgraft_common.backbone import Backbone
from fedgraft_common.errors import ExportError

TOLERANCE = 1e-4
"""Largest allowed difference of an output, relative to the largest output where that is above 1."""
TRIALS = (1, 3)
"""Numbers of records that the file is tried with; the first is not the one it was traced with."""


def export_onnx(
    model: nn.Module, backbone: Backbone, path: Path, facts: dict[str, str] | None = None
) -> float:
    """Writes the file and runs it with onnxruntime beside the model.

    Args:
        model: prepared inputs, in the order of the backbone's names, to one output.
        backbone: names and synthetic inputs.
        path: of the file; replaced only by one that passed.
        facts: metadata, text by key.

    Returns:
        The largest difference found, see `TOLERANCE`.

    Raises:
        ExportError: the packages are not installed, the model cannot be written as ONNX, or the
            file computes something else.
    """
    require_onnx()
    example = backbone.example(2, torch.Generator().manual_seed(0))
    unfinished = path.with_name(f".{path.name}.part")
    try:
        with _quiet(), torch.no_grad():
            _write(model, backbone, example, unfinished, facts or {})
        gap = max(_gap(model, backbone, unfinished, records) for records in TRIALS)
        if not gap <= TOLERANCE:
            raise ExportError(
                str(path), f"outputs that differ by {gap:.1e}", f"at most {TOLERANCE:g}",
                "Nothing was kept; deploy with `fedgraft predict` or the merged weights instead.",
            )  # fmt: skip
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return gap


def quantise(source: Path, path: Path) -> None:
    """Weights of an ONNX file in 8 bits, by onnxruntime's dynamic quantisation.

    Raises:
        ExportError: it cannot be quantised.
    """
    require_onnx()
    from onnxruntime.quantization import QuantType, quantize_dynamic

    try:
        with _quiet():
            quantize_dynamic(
                source, path, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"]
            )
    except Exception as error:  # whatever the library runs into, there is no file
        path.unlink(missing_ok=True)
        raise ExportError(
            str(path), first_line(error), "a model that onnxruntime can quantise",
            "Use the file with 32-bit weights.",
        ) from None  # fmt: skip


def run_onnx(path: Path, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The file's output for prepared inputs, computed by onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


def require_onnx() -> None:
    """Refuses early if the optional packages are missing.

    Raises:
        ExportError: they are.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(
            "onnx", f"not installed ({error.name})", "the packages of the extra `onnx`",
            "Install them: pip install 'fedgraft[onnx]'.",
        ) from None  # fmt: skip


def first_line(error: Exception) -> str:
    """What an error says first, in one line that a table can hold."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [line for line in lines if line.startswith("<class")] or lines
    cause: BaseException | None = error
    while cause is not None and cause.__cause__ is not None:
        cause = cause.__cause__
    if cause is not error and cause is not None and str(cause).strip():
        return f"{type(cause).__name__}: {str(cause).strip().splitlines()[0][:160]}"
    return f"{type(error).__name__}: {causes[0][:160]}" if causes else type(error).__name__


def _write(
    model: nn.Module,
    backbone: Backbone,
    example: tuple[torch.Tensor, ...],
    path: Path,
    facts: dict[str, str],
) -> None:
    batch = torch.export.Dim("records", min=1)
    try:
        program: Any = torch.onnx.export(
            _Positional(model),
            example,
            dynamo=True,
            input_names=list(backbone.input_names),
            output_names=["outputs"],
            dynamic_shapes={"inputs": tuple({0: batch} for _ in example)},
            verbose=False,
        )
        for key, value in {**_preparation(backbone), **facts}.items():
            program.model.metadata_props[key] = value
        program.save(path)
    except Exception as error:  # the exporter raises what it runs into
        raise ExportError(
            "onnx", first_line(error), "a model that torch.onnx.export can write",
            "Deploy with `fedgraft predict` or the merged weights instead.",
        ) from None  # fmt: skip


def _preparation(backbone: Backbone) -> dict[str, str]:
    about: Any = backbone.preparation
    return {
        "fedgraft.preparation": json.dumps(about.model_dump(mode="json", exclude={"directory"}))
    }


def _gap(model: nn.Module, backbone: Backbone, path: Path, records: int) -> float:
    inputs = backbone.example(records, torch.Generator().manual_seed(records))
    with torch.no_grad():
        expected = model(*inputs)
    found = run_onnx(path, inputs)
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1))


class _Positional(nn.Module):
    """The exporter wants one name for all inputs of a model that takes any number of them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.model(*inputs)
        return outputs


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's running commentary."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
