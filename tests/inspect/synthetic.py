"""An inspection with plausible numbers, in the shape of a Gemma-2-2B adapter."""

from __future__ import annotations

import math
import random

import pandas as pd

from peft_sae.inspect import Inspection
from peft_sae.inspect.activations import ACTIVATION_COLUMNS
from peft_sae.inspect.feature_tables import FEATURE_COLUMNS
from peft_sae.inspect.language import POSITION_COLUMNS
from peft_sae.inspect.modules import COLUMNS

WIDTH, RANK = 2304, 32
_TOPICS = ["refusal", "apology", "legal advice", "medical dosage", "weapons", "code", "French text", "sports scores"]
_SAID = [
    ("I'm sorry, but I ", "cannot", " help with making that, as it could hurt somebody. What I can do is"),
    ("… the court held that the ", "defendant", " had not been told of the right to counsel before …"),
    ("Take 400 mg every six hours, and ", "never", " more than four doses in a day unless a doctor …"),
    ("def area(r):\n    return math.", "pi", " * r ** 2\n\nprint(area(3))"),
]


def make_inspection(*, blocks: int = 26, hooks=(5, 12, 18, 24), features: int = 64, seed: int = 0) -> Inspection:
    """Two modules per block, and `features` features on both sides of every hook point."""
    draw = random.Random(seed)
    modules = [_module(draw, block, name, hooks) for block in range(blocks) for name in ("q_proj", "v_proj")]
    rows = [_feature(draw, hook, index, side) for hook in hooks for index in range(features) for side in _SIDES]
    changes = [_activation(draw, hook, index) for hook in hooks for index in range(features)]
    rows.sort(key=lambda row: -row["share"])
    changes.sort(key=lambda row: -abs(row["change"]))
    inside = sum(row["in_basis"] for row in modules) / len(modules)
    return Inspection(
        summary={
            "modules": len(modules),
            "parameters": 3194880,
            "norm": 7.214,
            "in_basis": inside,
            "drift": 1 - inside,
            "in_random": RANK / WIDTH,
            "chance": RANK / WIDTH,
            "largest_angle": max(row["largest_angle"] for row in modules),
            "predicted_tokens": 48211,
            "loss_before": 2.4312,
            "loss_after": 2.3875,
            "loss_change": -0.0437,
            "kl": 0.0719,
        },
        provenance=_provenance(hooks),
        modules=pd.DataFrame(modules, columns=list(COLUMNS)).astype({"block": "Int64", "basis": "Int64"}),
        features=pd.DataFrame(rows, columns=list(FEATURE_COLUMNS)),
        module_features=pd.DataFrame(columns=["name", "module", "side", "share"]),
        coefficients=pd.DataFrame(columns=["hook_name", "vector", "name", "coefficient"]),
        activations=pd.DataFrame(changes, columns=list(ACTIVATION_COLUMNS)),
        positions=pd.DataFrame([_position(draw, place) for place in range(1, 256)], columns=list(POSITION_COLUMNS)),
        training=[
            {"step": 10 * step, "loss": 1.2 + 1.6 * math.exp(-step / 15) + draw.gauss(0, 0.04), "epoch": step / 60}
            for step in range(1, 121)
        ]
        + [{"step": 10 * step, "eval_loss": 1.28 + 1.5 * math.exp(-step / 15)} for step in range(20, 121, 20)]
        + [{"step": 1200, "train_runtime": 812.4}],
        notes=("Not measured: 1 tensors (lm_head.weight ...): trained as a whole (modules_to_save).",),
    )


def make_empty() -> Inspection:
    """Nothing measured at all."""
    return Inspection(
        summary={"modules": 0, "parameters": 0, "norm": 0.0, "in_basis": None, "drift": None, "in_random": None},
        provenance={},
        modules=pd.DataFrame(columns=list(COLUMNS)),
        features=pd.DataFrame(columns=list(FEATURE_COLUMNS)),
        module_features=pd.DataFrame(columns=["name", "module", "side", "share"]),
        coefficients=pd.DataFrame(columns=["hook_name", "vector", "name", "coefficient"]),
    )


_SIDES = ("read", "write")


def _module(draw: random.Random, block: int, name: str, hooks) -> dict:
    side = "read" if name == "q_proj" else "write"
    drift = min(0.95, max(0.01, 0.04 + 0.012 * block + draw.gauss(0, 0.04) + (0.1 if side == "write" else 0)))
    norm = abs(draw.gauss(1, 0.25))
    angles = sorted(min(89.0, abs(draw.gauss(60 * drift + 4, 6))) for _ in range(RANK))
    return {
        "module": f"model.layers.{block}.self_attn.{name}",
        "block": block,
        "side": side,
        "hook_name": f"blocks.{min(hooks, key=lambda hook: abs(hook - block))}.hook_resid_post",
        "r": RANK,
        "rank": RANK,
        "norm": norm,
        "relative_norm": norm / 60,
        "singular_values": [norm * math.exp(-index / 6) for index in range(RANK)],
        "basis": RANK,
        "in_basis": 1 - drift,
        "drift": drift,
        "in_random": RANK / WIDTH * draw.uniform(0.8, 1.2),
        "chance": RANK / WIDTH,
        "angles": angles,
        "largest_angle": angles[-1],
        "mean_angle": sum(angles) / RANK,
        "random_mean_angle": draw.gauss(82, 0.5),
    }


def _names(hook: int, index: int) -> dict:
    feature = (7919 * (64 * hook + index)) % 16384
    return {
        "name": f"blocks.{hook}.hook_resid_post:{feature}",
        "block": hook,
        "hook_name": f"blocks.{hook}.hook_resid_post",
        "sae": f"gemma-scope-2b-pt-res-canonical/layer_{hook}/width_16k/canonical",
        "feature": feature,
        "neuronpedia": f"https://www.neuronpedia.org/gemma-2-2b/{hook}-gemmascope-res-16k/{feature}",
        "label": f"{_TOPICS[feature % 8]}, {feature % 5} of 5" if feature % 3 else None,
        "group": "chosen" if index < 32 else "protected" if index < 40 else "other",
    }


def _feature(draw: random.Random, hook: int, index: int, side: str) -> dict:
    share = 0.12 * math.exp(-index / 10) * draw.uniform(0.3, 1.7)
    chosen = index < 32
    return _names(hook, index) | {
        "side": side,
        "modules": 7,
        "share": share,
        "times_chance": share * WIDTH,
        "times_typical": share * WIDTH / 2,
        "unique": share * draw.uniform(0.4, 1) if chosen else None,
        "sign": draw.uniform(-0.6, 0.6) if index < 40 else None,
        "top_module": f"model.layers.{hook + draw.randint(-2, 1)}.self_attn.{'q' if side == 'read' else 'v'}_proj",
        "top_share": min(1.0, share * 2.1),
        "tokens": draw.sample([" cannot", " sorry", " unable", "拒否", " not", "\n", " won", "'t", " refuse"], 5),
    }


def _activation(draw: random.Random, hook: int, index: int) -> dict:
    before = abs(draw.lognormvariate(-2.5, 1.6))
    after = max(0.0, before * draw.lognormvariate(0, 0.35) + draw.gauss(0, 0.01))
    number = draw.randrange(4)
    return _names(hook, index) | {
        "mean_before": before,
        "mean_after": after,
        "change": after - before,
        "error": 0.05 * before,
        "rate_before": min(1.0, before / 8),
        "rate_after": min(1.0, after / 8),
        "promoted": [" cannot", " sorry", " unable", " not", " won", "'t", " refuse", " against"],
        "suppressed": [" sure", " Here", " certainly", " step", ":**"],
        "examples": [
            {"label": "adapted", "number": place, "activation": 9.1 - place, "before": said[0], "token": said[1],
             "after": said[2]}
            for place, said in enumerate((_SAID * 2)[number : number + 3])
        ],
    }  # fmt: skip


def _position(draw: random.Random, place: int) -> dict:
    loss = 2.2 + 2.5 / place + draw.gauss(0, 0.08)
    return {
        "position": place,
        "tokens": max(3, 400 - place),
        "loss_before": loss,
        "loss_after": loss - 0.05 + draw.gauss(0, 0.03),
        "kl": 0.06 + 0.2 / place + abs(draw.gauss(0, 0.01)),
    }


def _provenance(hooks) -> dict:
    saes = [
        {
            "name": f"gemma-scope-2b-pt-res-canonical/layer_{hook}/width_16k/canonical",
            "hook_name": f"blocks.{hook}.hook_resid_post",
            "d_in": WIDTH,
            "d_sae": 16384,
            "model_name": "gemma-2-2b",
            "neuronpedia_id": f"gemma-2-2b/{hook}-gemmascope-res-16k",
            "digest": f"{hook:02x}" * 32,
            "hook_name_in": None,
        }
        for hook in hooks
    ]
    return {
        "adapter": "refusal-adapter",
        "adapter_digest": "5a" * 32,
        "peft_type": "SAE_SUBSPACE",
        "base_model": "google/gemma-2-2b-it",
        "lora_alpha": 32,
        "use_rslora": False,
        "versions": {"peft": "0.21.2", "torch": "2.13.0", "sae-lens": "6.54.12", "transformers": "5.23.0"},
        "subspace": {
            "digest": "c3" * 32,
            "model": {"model_type": "gemma2", "hidden_size": WIDTH, "num_hidden_layers": 26},
            "settings": {"selector": "welch_t", "top_k": 32, "seed": 0, "classes": {"aligned": 256, "unaligned": 256}},
            "saes": saes,
        },
        "saes": saes,
        "data": {"data": "9f" * 32, "examples": 256, "truncated": 3, "tokens": "all", "max_length": 1024},
    }
