"""Sides, norms and sites are right for each architecture: by what happens to the stream, not by names."""

from contextlib import contextmanager

import pytest
import torch
from peft import get_peft_model

from peft_sae import SaeSubspaceConfig
from peft_sae.layout import Site
from peft_sae.sae.placement import find_layout, find_tap
from tests.tiny import FAMILIES, WIDTH, make_classifier, make_model, make_subspace

IDS = torch.randint(4, 16, (2, 9), generator=torch.Generator().manual_seed(0))
ALL = [*FAMILIES, "bert"]
BASIS = 3


def make(family):
    return make_classifier() if family == "bert" else make_model(family)


def modules_of(family, side):
    """Paths within a block of the modules that read, or write, the residual stream."""
    roles = find_layout(make(family)).roles
    return [path for path, found in roles.items() if found[0].side == side]


CASES = {side: [(family, path) for family in ALL for path in modules_of(family, side)] for side in ("read", "write")}


def adapt(family, path, block):
    """Only one module of one block adapted, with a frozen basis, and its other factor random."""
    torch.manual_seed(0)
    model = make(family)
    subspace = make_subspace(model, {"blocks.1.hook_resid_post": BASIS})
    name = f"{subspace.layout.blocks}.{block}.{path}"
    config = SaeSubspaceConfig(
        subspace=subspace, r=BASIS, freeze_basis=True, target_modules=[name], fan_in_fan_out=family == "gpt2"
    )
    adapted = get_peft_model(model, config).eval()
    layer = adapted.get_base_model().get_submodule(name)
    free = layer.lora_B if subspace.layout.roles[path][0].side == "read" else layer.lora_A
    torch.nn.init.normal_(free["default"].weight, std=0.3)
    return adapted, layer, subspace


@contextmanager
def recorded(module):
    """Collect a module's inputs and outputs."""
    calls = []

    def record(_, args, output):
        calls.append((args[0].detach(), (output[0] if isinstance(output, tuple) else output).detach()))

    handle = module.register_forward_hook(record)
    try:
        yield calls
    finally:
        handle.remove()


def stream_at(model, block, site):
    """The module, and which of its ends, where the stream is at a site."""
    if model.config.model_type == "bert" and site == "resid_mid":  # what the attention's norm returns
        return model.get_submodule(f"bert.encoder.layer.{block}.attention"), 1
    tap = find_tap(model, Site(block, site))
    return model.get_submodule(tap.module), 0 if tap.end == "input" else 1


def linear_part(norm):
    """The gain of a norm and whether it centres, from what it does to unit vectors."""
    zero = norm(torch.zeros(1, WIDTH))
    constant = (norm(torch.ones(1, WIDTH)) - zero).abs().max()
    gain = (norm(torch.eye(WIDTH)) - zero).detach().diagonal()
    return gain, bool(constant < 1e-3 * gain.abs().max())


@pytest.mark.parametrize(("family", "path"), CASES["read"])
def test_a_frozen_reader_sees_the_basis_and_nothing_orthogonal_to_it(family, path):
    """Along the carried basis a step of the stream changes the output, across it only the output's scale."""
    adapted, layer, subspace = adapt(family, path, 1)
    model, role = adapted.get_base_model(), subspace.layout.roles[path][0]
    norm = torch.nn.Identity() if role.norm is None else model.get_submodule(f"{subspace.layout.blocks}.1.{role.norm}")
    place, end = stream_at(model, 1, role.site)
    with torch.no_grad(), recorded(layer) as read, recorded(place) as stream:
        model(IDS)
    torch.testing.assert_close(
        read[0][0], norm(stream[0][end]), rtol=0, atol=1e-6
    )  # site, norm and module belong together

    rows = layer.lora_A["default"].weight.detach()
    x = stream[0][end].reshape(-1, WIDTH)
    step = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    gain, centres = (torch.ones(WIDTH), False) if role.norm is None else linear_part(norm)
    constraints = rows * gain
    if centres:
        constraints = torch.cat([constraints - constraints.mean(-1, keepdim=True), torch.ones(1, WIDTH)])
    frame = torch.linalg.qr(constraints.T)[0]

    def seen(stream):
        with torch.no_grad():
            centred = norm(stream) - norm(torch.zeros_like(stream))
            return layer.lora_B["default"](layer.lora_A["default"](centred))

    across = seen(x + step - (step @ frame) @ frame.T)
    scale = (across * seen(x)).sum(-1) / seen(x).square().sum(-1)
    torch.testing.assert_close(across, scale[:, None] * seen(x), rtol=1e-3, atol=1e-3)
    assert role.norm is not None or torch.allclose(scale, torch.ones(1), atol=1e-4)
    for row in constraints[:BASIS]:
        along = seen(x + 3 * x.norm(dim=-1, keepdim=True) * row / row.norm())
        turned = torch.nn.functional.cosine_similarity(along, seen(x)) < 0.99
        assert turned.float().mean() > 0.8  # a token may happen to lie along it already


@pytest.mark.parametrize(("family", "path"), CASES["write"])
def test_a_frozen_writer_moves_the_stream_only_inside_the_features_span(family, path):
    """Adapter on and off differ at the site only by what the module writes."""
    adapted, _, subspace = adapt(family, path, 2)
    model, role = adapted.get_base_model(), subspace.layout.roles[path][0]
    place, end = stream_at(model, 2, role.site)

    def stream():
        with torch.no_grad(), recorded(place) as calls:
            model(IDS)
        return calls[0][end].reshape(-1, WIDTH)

    on = stream()
    with adapted.disable_adapter():
        off = stream()
    change = on - off
    spans = subspace.sites[0].basis.expand(len(change), -1, -1)
    if role.norm is not None:  # a post-norm also rescales what it is given, and one that centres takes off a mean
        norm = model.get_submodule(f"{subspace.layout.blocks}.2.{role.norm}")
        with adapted.disable_adapter(), torch.no_grad(), recorded(norm) as calls:
            model(IDS)
        own = (calls[0][1] - norm(torch.zeros(1, WIDTH))).detach().reshape(-1, 1, WIDTH)
        gain, centres = linear_part(norm)
        spans = torch.cat([spans, own, *([gain.expand(len(change), 1, -1)] if centres else [])], dim=1)
    frames = torch.linalg.qr(spans.transpose(1, 2))[0]
    inside = (frames @ (frames.transpose(1, 2) @ change[..., None])).squeeze(-1)

    assert change.abs().max() > 1e-2
    torch.testing.assert_close(inside, change, rtol=0, atol=float(1e-4 * change.abs().max()))
    # Not vacuous: each direction of the basis is used.
    assert ((change @ subspace.sites[0].basis.T).abs().amax(0) > 1e-3).all()
