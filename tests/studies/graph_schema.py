"""What readers of attribution graphs (Neuronpedia, circuit-tracer) require, as a JSON schema."""

from __future__ import annotations

from typing import Any

_NAME = {"type": "string", "pattern": "^[A-Za-z0-9_.-]+$"}
_TEXT = {"type": "string"}


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "object", "properties": required | (optional or {}), "required": list(required)}


_METADATA = _object(
    {
        "slug": _NAME,
        "scan": _NAME,
        "transcoder_list": {"type": "array", "items": _TEXT},
        "prompt_tokens": {"type": "array", "items": _TEXT, "minItems": 1},
        "prompt": _TEXT,
    },
    {"schema_version": {"const": 1}, "node_threshold": {"type": "number", "minimum": 0, "maximum": 1}},
)
_NODE = _object(
    {
        "node_id": {"type": "string", "minLength": 1},
        "feature": {"type": ["integer", "null"]},
        "layer": {"type": ["string", "integer"]},
        "ctx_idx": {"type": "integer", "minimum": 0},
        "feature_type": {"enum": ["cross layer transcoder", "mlp reconstruction error", "embedding", "logit"]},
        "jsNodeId": _TEXT,
        "clerp": _TEXT,
    },
    {"influence": {"type": ["number", "null"]}, "activation": {"type": ["number", "null"]}},
) | {
    # Neuronpedia reads the probability out of a logit's label.
    "if": {"properties": {"feature_type": {"const": "logit"}}},
    "then": {"properties": {"clerp": {"pattern": r"\(p=[0-9.]+\)"}}},
}
_QUERY = _object(
    {
        "pinnedIds": {"type": "array", "items": _TEXT},
        "supernodes": {"type": "array", "items": {"type": "array", "items": _TEXT, "minItems": 2}},
        "linkType": _TEXT,
        "clickedId": _TEXT,
        "sg_pos": _TEXT,
    }
)
GRAPH_SCHEMA: dict[str, Any] = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    **_object(
        {
            "metadata": _METADATA,
            "qParams": _QUERY,
            "nodes": {"type": "array", "items": _NODE, "minItems": 1},
            "links": {
                "type": "array",
                "items": _object({"source": _TEXT, "target": _TEXT, "weight": {"type": "number"}}),
                "minItems": 1,
            },
        }
    ),
}
