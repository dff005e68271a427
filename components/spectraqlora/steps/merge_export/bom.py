"""The bill of materials beside an exported model: CycloneDX 1.6 (ECMA-424), its part for machine learning.

It holds no time and no random number: the same run writes the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import yaml

from spectraqlora import __version__
from spectraqlora.artifacts import Evaluation, FourBitModel, MergedModel, PreparedRows
from spectraqlora.errors import InputError
from spectraqlora.files import file_digest
from spectraqlora.places import base_place, kind_of
from spectraqlora.runtime.images import REVISION, step_image

BOM = "bom.cdx.json"
_PREFIX = "spectraqlora:"
_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "safetensors")


def bill_of_materials(
    result: MergedModel, evaluation: Evaluation, manifest: FourBitModel, rows: PreparedRows, merged: Path
) -> dict[str, Any]:
    """What the model was made of: base and data with digests, program, images, settings, measured numbers.

    Args:
        result: of merging.
        evaluation: of the winner.
        manifest: of the base.
        rows: that it was trained on.
        merged: folder of the exported weights.

    Returns:
        A JSON document. Paths and buckets of the base and the data are left out, their last names stay.
    """
    digest = {path.name: file_digest(path) for path in sorted(merged.glob("*.safetensors"))}
    parts = [_base(manifest), _data(rows), *_images(evaluation), *_libraries()]
    body: dict[str, Any] = {
        "version": 1,
        "metadata": {
            "tools": {"components": [_program()]},
            "component": {
                "type": "machine-learning-model",
                "bom-ref": "model",
                "name": f"{_name(manifest.source)}-{result.method}",
                "version": hashlib.sha256(json.dumps(digest).encode()).hexdigest()[:16],
                "modelCard": _card(result, evaluation, merged),
                "properties": _properties(
                    {f"file.{name}.sha256": value for name, value in digest.items()}
                    | _settings(result, evaluation, manifest)
                ),
            },
        },
        "components": parts,
        "dependencies": [{"ref": "model", "dependsOn": [part["bom-ref"] for part in parts]}],
    }
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(body, sort_keys=True))
    return {"bomFormat": "CycloneDX", "specVersion": "1.6", "serialNumber": f"urn:uuid:{serial}", **body}


def _base(manifest: FourBitModel) -> dict[str, Any]:
    part: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": "base",
        "name": _name(manifest.source),
        "hashes": _sha256(manifest.base_digest),
        "licenses": [{"license": {"name": _license(manifest)}}],
    }
    if kind_of(manifest.source) == "hub":
        part |= {
            "version": manifest.revision,
            "purl": f"pkg:huggingface/{manifest.source}@{manifest.revision}",
        }
    return part


def _data(rows: PreparedRows) -> dict[str, Any]:
    counts = {"train_rows": rows.train_rows, "eval_rows": rows.eval_rows, "test_rows": rows.test_rows}
    return {
        "type": "data",
        "bom-ref": "data",
        "name": _name(rows.source),
        "hashes": _sha256(rows.digest),
        "data": [{"type": "dataset", "name": _name(rows.source)}],
        "properties": _properties({**counts, "layout": rows.layout}),
    }


def _program() -> dict[str, Any]:
    part: dict[str, Any] = {"type": "application", "name": "spectraqlora", "version": __version__}
    if revision := os.environ.get(REVISION):
        part["properties"] = _properties({"source_revision": revision})
    return part


def _images(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The images in which the winner was trained and merged, with digests where the cluster names them by these."""
    images = {part.training.image: "train" for part in evaluation.rounds} | {step_image(): "merge-export"}
    parts = []
    for image, step in images.items():
        if image and not image.startswith("none"):
            name, _, digest = image.partition("@sha256:")
            hashes = {"hashes": _sha256(digest)} if digest else {}
            part = {"type": "container", "bom-ref": f"image-{step}", "name": name or image, **hashes}
            parts.append({**part, "properties": _properties({"reference": image})})
    return parts


def _libraries() -> list[dict[str, Any]]:
    return [
        {
            "type": "library",
            "bom-ref": f"pypi-{name}",
            "name": name,
            "version": installed(name),
            "purl": f"pkg:pypi/{name}@{installed(name).replace('+', '%2B')}",
        }
        for name in _LIBRARIES
    ]


def _card(result: MergedModel, evaluation: Evaluation, merged: Path) -> dict[str, Any]:
    config = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    seq2seq = bool(config.get("is_encoder_decoder"))
    return {
        "modelParameters": {
            "approach": {"type": "supervised"},
            "task": "text2text-generation" if seq2seq else "text-generation",
            "architectureFamily": str(config.get("model_type", "")),
            "modelArchitecture": ", ".join(config.get("architectures") or ()),
            "datasets": [{"ref": "data"}],
        },
        "quantitativeAnalysis": {
            "performanceMetrics": [
                {"type": name, "value": f"{value:.9g}", "slice": "held-out rows"}
                for name, value in {
                    **evaluation.headline(),
                    "merged_eval_loss": result.verified_eval_loss,
                }.items()
            ]
        },
    }


def _settings(result: MergedModel, evaluation: Evaluation, manifest: FourBitModel) -> dict[str, Any]:
    log = evaluation.rounds[-1].training
    flat = {
        "method": result.method,
        "merged_into": result.merged_into,
        "rounds": len(evaluation.rounds),
        "seed": log.seed,
        "quantization": f"{manifest.quant_type}, double {manifest.double_quant}",
        "signed_by": result.signed_by or "nobody",
    }
    for section, values in {**evaluation.settings, "train": log.settings}.items():
        flat |= {f"{section}.{name}": value for name, value in values.items()}
    return flat


def _properties(values: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "name": f"{_PREFIX}{name}",
            "value": value if isinstance(value, str) else json.dumps(value),
        }
        for name, value in values.items()
    ]


def _sha256(digest: str) -> list[dict[str, str]]:
    """A hash as CycloneDX writes it; none for what is no SHA-256, such as a hub's commit."""
    return [{"alg": "SHA-256", "content": digest}] if len(digest) == 64 else []


def _name(source: str) -> str:
    """A hub id; of a path or an address the last name: where these are is nobody's business but their owner's."""
    return source if kind_of(source) == "hub" else Path(source).name


def _license(manifest: FourBitModel) -> str:
    """What the base's own card says, from its folder or from the hub; `unknown` where nobody says it."""
    card = _folders_card(manifest)
    if not card and kind_of(manifest.source) == "hub":
        try:
            card = base_place(manifest.source, manifest.revision).card()
        except InputError:
            return "unknown"
    found = card.get("license")
    if found == "other":
        found = card.get("license_name") or found
    return str(found) if found else "unknown"


def _folders_card(manifest: FourBitModel) -> dict[str, Any]:
    """The front matter of the README of the base's folder; empty where there is none."""
    try:
        text = (Path(manifest.source_path) / "README.md").read_text(encoding="utf-8")
        document = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else None
    except (OSError, UnicodeDecodeError, IndexError, yaml.YAMLError):
        return {}
    return document if isinstance(document, dict) else {}
