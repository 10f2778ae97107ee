"""Schemes as data: what the options make, and what stands in config.json."""

from __future__ import annotations

import json
from typing import Any

import pytest

from quantkit.errors import InputRejected, UsageError
from quantkit.model.sites import KINDS
from quantkit.pack.job import parse_sites
from quantkit.pack.scheme import SiteFormat, build, from_json, pass_through


def words(**options: Any) -> dict[str, str]:
    scheme = build(**options)
    return {kind: fmt.words() if fmt else "-" for kind, fmt in scheme.sites.items()}


def test_osc_is_the_papers_recipe() -> None:
    branch = "mxfp4 + bf16 branch"
    expected = dict.fromkeys(KINDS, branch) | {"mlp_out": "mxfp8"}
    assert words(name="osc") == expected
    assert words(name="osc", mlp_out="mxfp4") == dict.fromkeys(KINDS, branch)


def test_sites_override_the_scheme() -> None:
    sites = parse_sites(["mlp_out=bf16", "attn_in=nvfp4+fp8", "attn_out=mxfp8"])
    assert words(name="mxfp4", sites=sites) == {
        "attn_in": "nvfp4 + fp8 branch",
        "attn_out": "mxfp8",
        "mlp_in": "mxfp4",
        "mlp_out": "-",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "int3"}, "unknown scheme 'int3'"),
        ({"name": "osc", "group": 48}, "group 48: one of 32, 64, 128"),
        ({"name": "osc", "scale_rule": "best"}, "scale rule 'best'"),
        ({"name": "osc", "mlp_out": "int8"}, "unknown format 'int8"),
        ({"name": "osc", "sites": {"mlp": "mxfp4"}}, "unknown site kind 'mlp'"),
        ({"name": "osc", "sites": {"mlp_in": "mxfp4+int8"}}, "unknown format"),
        ({"name": "osc", "branch": "int8"}, "branch 'int8': one of bf16, fp8, residual"),
        ({"name": "osc", "sites": {"mlp_out": "mxfp8+residual"}}, "mlp_out: a residual branch"),
        ({"name": "mxfp8", "branch": "residual", "separated": True}, "4-bit formats, not mxfp8"),
    ],
)
def test_bad_options_are_usage_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(**options)


@pytest.mark.parametrize("choice", ["mlp_out", "=mxfp4", "mlp_out="])
def test_bad_site_choices_are_usage_errors(choice: str) -> None:
    with pytest.raises(UsageError, match="is not KIND=FORMAT"):
        parse_sites([choice])


def test_residual_branches_everywhere() -> None:
    branch = "mxfp4 + residual branch"
    assert words(name="osc", branch="residual", mlp_out="mxfp4") == dict.fromkeys(KINDS, branch)
    found = words(name="w4a4", branch="residual", separated=True)
    assert found == dict.fromkeys(KINDS, "nvfp4 + residual branch")
    scheme = build("osc", branch="residual")
    own = SiteFormat("nvfp4", "nvfp4", "residual", 0, 48, {"size": 64})
    scheme = type(scheme)("osc", scheme.sites, "even", {"layers.1.mlp_in": own})
    assert from_json(json.loads(json.dumps(scheme.to_json()))) == scheme
    assert own.appended == 48
    assert SiteFormat("nvfp4", "nvfp4", "fp8", 0, 48).appended == 0


def test_json_round_trip() -> None:
    scheme = build("osc", group=64, scale_rule="mse", sites={"attn_out": "bf16"})
    own = SiteFormat("mxfp4", "mxfp4", "bf16", 64, 32, {"block": 32})
    scheme = type(scheme)(
        scheme.name, scheme.sites, "mse", {"layers.1.mlp_in": own, "layers.0.mlp_in": None}
    )
    data = json.loads(json.dumps(scheme.to_json()))
    again = from_json(data)
    assert again == scheme
    assert again.site("layers.1.mlp_in", "mlp_in") == own
    assert again.site("layers.0.mlp_in", "mlp_in") is None
    assert again.site("layers.2.mlp_in", "mlp_in") == scheme.sites["mlp_in"]
    assert own.hadamard_size == 32


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": 2},
        {"quant_method": "other"},
        {"scale_rule": "best"},
        {"sites": {}},
        {"sites": []},
        {"overrides": {"layers.0.mlp_in": {"weights": "int3", "activations": "none"}}},
        {"overrides": {"layers.0.mlp_in": {"weights": "mxfp4", "activations": "none", "k": 1}}},
        {"overrides": {"layers.0.mlp_in": 4}},
        {"overrides": []},
        {"ignore": "lm_head"},
    ],
)
def test_hostile_json_is_rejected(change: dict[str, Any]) -> None:
    with pytest.raises(InputRejected):
        from_json(build("osc").to_json() | change)


@pytest.mark.parametrize(
    "change",
    [
        {"outliers": -1},
        {"outliers": "many"},
        {"group": None},
        {"branch": "int8"},
        {"hadamard": {"block": 0}},
        {"hadamard": {"block": 32, "size": 64}},
        {"hadamard": [32]},
        {"branch": "residual", "outliers": 16},  # half a block of MXFP4
        {"branch": "residual", "weights": "mxfp8", "activations": "mxfp8"},
        {"branch": "residual", "weights": "nvfp4"},
        {"branch": "residual", "activations": "none"},
    ],
)
def test_hostile_sites_are_rejected(change: dict[str, Any]) -> None:
    data = build("osc").to_json()
    data["sites"]["attn_in"] |= change
    with pytest.raises(InputRejected, match="site attn_in is not understood"):
        from_json(data)


def test_pass_through_keeps_what_happens_besides_rounding() -> None:
    scheme = pass_through(build("osc"))
    fmt = scheme.sites["attn_in"]
    assert fmt is not None
    assert (fmt.weights, fmt.activations, fmt.branch) == ("none", "none", "bf16")
    fmt = pass_through(build("osc", branch="residual")).sites["attn_in"]
    assert fmt is not None
    assert (fmt.weights, fmt.activations, fmt.branch) == ("none", "none", "residual")
