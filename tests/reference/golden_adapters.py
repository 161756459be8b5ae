"""Adapters, one per method, that run a recorded case through the public classes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.injection.before_llm import Kept, merge_crops
from secateur.injection.prompt import PlacedImage
from secateur.pruners import LayerTokens, Pruner, Selection, VisualTokens, build
from secateur.pruners.linalg import complement, top_k

FEATURE_ATOL = 1e-5

Case = dict[str, Any]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Comparison:
    """One recorded output beside ours. Integers have to be equal, floats within atol."""

    what: str
    ours: Tensor
    theirs: Tensor
    atol: float = FEATURE_ATOL

    @property
    def exact(self) -> bool:
        if self.ours.shape != self.theirs.shape:
            return False
        if self.theirs.numel() and self.theirs.is_floating_point():
            return self.error <= self.atol
        return torch.equal(self.ours.long(), self.theirs.long())

    @property
    def error(self) -> float:
        """Largest absolute difference of a float output, 0 for indices."""
        if (
            not self.theirs.is_floating_point()
            or not self.theirs.numel()
            or self.ours.shape != self.theirs.shape
        ):
            return 0.0
        error = (self.ours.double() - self.theirs.double()).abs().max().item()
        return error if error == error else float("inf")


Adapter = Callable[[Case, Tensors], list[Comparison]]
METHODS: dict[str, Adapter] = {}


def golden(method: str) -> Callable[[Adapter], Adapter]:
    """Decorator for the adapter of `method`; a trailing `_ref` of a file's method is ignored."""

    def add(adapter: Adapter) -> Adapter:
        METHODS[method] = adapter
        return adapter

    return add


def _budget(case: Case, tokens: VisualTokens, name: str = "budget") -> tuple[int, int]:
    """(tokens to keep, N). A budget of N or more keeps all; no order is compared then."""
    return min(case[name], tokens.shape[1]), tokens.shape[1]


def _run(pruner: Pruner, tokens: VisualTokens, keep: int) -> Selection:
    """Selection of `keep` outputs; calls `select` from N on, where released code may merge."""
    return (
        pruner.prune(tokens, keep)
        if keep < tokens.shape[1]
        else pruner.select(tokens.in_float32(), keep)
    )


@golden("scope")
def _scope(case: Case, t: Tensors) -> list[Comparison]:
    options = {
        "alpha": case["alpha"],
        "combine": {"multi": "multiply", "add": "add"}[case["combined"]],
        "saliency": "cls" if case["cls_attn_used"] else "none",
    }
    tokens = VisualTokens(
        features=t["features"], encoder_features=t["features"], saliency=t["cls_attn"][:, None]
    )
    keep, count = _budget(case, tokens)
    spatial = build("scope", **options).prune(tokens, keep)
    results = [Comparison("selected_sorted", spatial.indices, t["selected_sorted"])]
    if keep < count:
        picked = build("scope", order="picked", **options).prune(tokens, keep)
        results.append(Comparison("selected", picked.indices, t["selected"]))
    return results


@golden("visionzip")
def _visionzip(case: Case, t: Tensors) -> list[Comparison]:
    heads, hidden, dominants = t["cls_attention"].shape[0], t["hidden"], case["dominant_patches"]
    tokens = VisualTokens(
        features=hidden[None, 1:],
        encoder_features=hidden[None, 1:],
        cls_token=hidden[None, 0],
        saliency=t["cls_attention"][None],
        encoder_keys=t["metric"].repeat(1, heads)[None],  # the recorded keys are means over heads
    )
    pruner = build("visionzip", contextual=case["contextual"])
    selection = _run(pruner, tokens, 1 + dominants + case["contextual"])
    assert selection.features is not None
    rows = selection.indices[0] + 1
    dominant = pruner.dominant(tokens, dominants)
    targets, others = pruner.split(complement(dominant, len(hidden) - 1), case["contextual"])
    return [
        Comparison("keep_with_cls", torch.cat([rows[:1], dominant[0] + 1]), t["keep_with_cls"]),
        Comparison("dominant_sorted", rows[: 1 + dominants], t["dominant_sorted"]),
        Comparison("context_targets", rows[1 + dominants :], t["context_targets"]),
        Comparison("assignment", pruner.assign(tokens, targets, others)[0], t["assignment"]),
        Comparison("tokens", selection.features[0], t["tokens"]),
    ]


@golden("vispruner")
def _vispruner(case: Case, t: Tensors) -> list[Comparison]:
    tokens = VisualTokens(
        t["features"][None], encoder_features=t["features"][None], saliency=t["cls_attention"][None]
    )
    keep, count = _budget(case, tokens)
    spatial, picked = (
        build("vispruner", important_ratio=case["important_ratio"], order=order)
        .prune(tokens, keep)
        .indices[0]
        for order in ("spatial", "picked")
    )
    results = [Comparison("sorted", spatial, t["sorted"])]
    if keep < count:
        results.append(Comparison("important", picked[: len(t["important"])], t["important"]))
        results.append(Comparison("selected", picked, t["selected"]))
    return results


@golden("prumerge")
def _prumerge(case: Case, t: Tensors) -> list[Comparison]:
    features = t["features"][None]
    tokens = VisualTokens(
        features, encoder_features=features, last_queries=t["q"][None], last_keys=t["k"][None]
    )
    name, adaptive = {
        "base_fixed": ("prumerge", False),
        "base_adaptive": ("prumerge", True),
        "plus_adaptive": ("prumerge_plus", True),
    }[case["mode"]]
    pruner = build(name, adaptive=adaptive)
    selection = _run(
        pruner, tokens, 1 if adaptive else int(features.shape[1] * case["ratio_used"]) + 1
    )
    assert selection.features is not None
    return [
        Comparison("cls_attn", pruner.attention(tokens)[0], t["cls_attn"]),
        Comparison("idx", selection.indices[0, :-1], t["idx"]),
        Comparison("tokens", selection.features[0], t["tokens"]),
        Comparison("n_out", torch.tensor(selection.indices.shape[1]), torch.tensor(case["n_out"])),
    ]


@golden("hiprune")
def _hiprune(case: Case, t: Tensors) -> list[Comparison]:
    count, width = len(t["object_layer_attention"]), case["width"]
    tokens = VisualTokens(
        features=torch.zeros(1, count, 1),
        grid=(count // width, width),
        object_attention=t["object_layer_attention"][None],
        output_attention=t["output_layer_attention"][None],
    )
    keep, _ = _budget(case, tokens)
    spatial, picked = (
        build("hiprune", alpha=case["alpha"], order=order).prune(tokens, keep).indices[0]
        for order in ("spatial", "picked")
    )
    results, first = [Comparison("sorted", spatial, t["sorted"])], len(t["anchor_and_buffer"])
    if keep < count:
        results.append(Comparison("anchor_and_buffer", picked[:first], t["anchor_and_buffer"]))
        results.append(Comparison("register", picked[first:], t["register"]))
    return results


@golden("fastv")
def _fastv(case: Case, t: Tensors) -> list[Comparison]:
    attention = t["last_query_attention"]
    visual, text = _spans(case, attention.shape[1])
    tokens = LayerTokens(visual, text, attention=attention[None, :, None])
    pruner = build("fastv", budget="after")
    kept = pruner.prune(tokens, case["attention_rank"]).indices
    return [
        Comparison(
            "top", visual.gather(1, pruner.rank(tokens, case["attention_rank"]))[0], t["top"]
        ),
        Comparison("keep", tokens.survivors(kept)[0], t["keep"]),
    ]


@golden("dart")
def _dart(case: Case, t: Tensors) -> list[Comparison]:
    visual, text = _spans(case, len(t["hidden"]))
    tokens = LayerTokens(visual, text, hidden=t["hidden"][None], keys=t["keys"][None])
    pruner = build(
        "dart", budget="after", image_pivots=case["pivot_image"], text_pivots=case["pivot_text"]
    )
    pivots = pruner.pivots(tokens)
    kept = visual.gather(1, pruner.prune(tokens, case["budget"]).indices)[0]
    return [
        Comparison("image_pivots", pivots[0][0], t["image_pivots"]),
        Comparison("text_pivots", pivots[1][0], t["text_pivots"]),
        Comparison("pivot_visit_order", pruner.visit_order(*pivots)[0], t["pivot_visit_order"]),
        Comparison("retained_sorted", kept, t["retained_sorted"]),
        Comparison(
            "retained",
            torch.tensor(pruner.tokens_after(visual.shape[1], case["budget"])),
            torch.tensor(case["retained"]),
        ),
    ]


def _spans(case: Case, length: int) -> tuple[Tensor, Tensor]:
    """Positions of the visual tokens and mask of the text after them, one row."""
    start, end = case["image_start"], case["image_start"] + case["N"]
    return torch.arange(start, end)[None], (torch.arange(length) >= end)[None]


@golden("anyres_order")
def _anyres_order(case: Case, t: Tensors) -> list[Comparison]:
    prunesid, tiles, grid = (
        case["method"] == "prunesid",
        (case["tiles_high"], case["tiles_wide"]),
        (24, 24),
    )
    kept = t["keep_with_cls"] - 1 if prunesid else t["keep_selection_order"]
    base, *mosaic = torch.arange((1 + len(kept)) * grid[0] * grid[1]).split(grid[0] * grid[1])
    tokens = torch.cat([base, torch.cat(mosaic).view(*tiles, *grid).transpose(1, 2).flatten()])
    image = PlacedImage(
        {}, grid, 1 + len(kept), tokens, row=0, places=torch.arange(len(tokens)), number=0
    )
    # features that name tile and patch tell the order in which they enter the LLM; one token of the
    # base crop leads them
    rows = [base[:1], *kept]
    named = [
        Kept(row, torch.stack([torch.full_like(row, crop - 1), row], 1), {})
        for crop, row in enumerate(rows)
    ]
    vectors = merge_crops(image, named, keeps_newlines=False, merges=False)[0].vectors
    assert vectors is not None
    crop, patch = vectors[1:].T
    theirs = t["out_patch"].clone()
    if prunesid:
        # the released code puts a tile's features, in group order, at its sorted indices
        for tile in range(len(kept)):
            mine = t["out_crop"] == tile
            theirs[mine] = theirs[mine].sort().values.roll(-1)  # CLS comes last
    return [Comparison("out_crop", crop, t["out_crop"]), Comparison("out_patch", patch, theirs)]


@golden("promprune")
def _promprune(case: Case, t: Tensors) -> list[Comparison]:
    options = {name: case[name] for name in ("mu", "tau", "kr_min", "kr_max")}
    tokens = VisualTokens(features=t["features"], saliency=t["cls_attn"][:, None])
    keep, count = _budget(case, tokens)
    spatial = build("promprune", **options).prune(tokens, keep)
    if keep == count:
        return [Comparison("selected_sorted", spatial.indices, t["selected_sorted"])]
    official = build("promprune", order="official", **options).prune(tokens, keep)
    counts = official.diagnostics["T_sal"]
    results = [
        Comparison("norm_entropy", official.diagnostics["entropy"], t["norm_entropy"]),
        Comparison(
            "local_ratio",
            official.diagnostics["saliency_ratio"],
            torch.tensor(case["local_ratio"]),
            atol=1e-4,
        ),
        Comparison("T_sal", counts, torch.tensor(case["T_sal"])),
    ]
    if not case.get(
        "strict", True
    ):  # rounding decides the first pick of stage 2; the class itself checks for repeats
        return [
            *results,
            Comparison(
                "count",
                torch.tensor(spatial.indices.shape),
                torch.tensor(t["selected_sorted"].shape),
            ),
        ]
    results.append(Comparison("selected_sorted", spatial.indices, t["selected_sorted"]))
    for b, (row, salient) in enumerate(zip(official.indices, counts.tolist(), strict=True)):
        results.append(
            Comparison(f"stage1_sorted.{b}", row[:salient].sort().values, t[f"stage1_sorted.{b}"])
        )
        results.append(Comparison(f"stage2_order.{b}", row[salient:], t[f"stage2_order.{b}"]))
    return results


@golden("prunesid")
def _prunesid(case: Case, t: Tensors) -> list[Comparison]:
    pruner = build("prunesid", variant=case["path"], seed=case["torch_seed"], order="official")
    if case["path"] == "llava":
        x, keep, chosen = t["hidden_states"][:, 1:], case["budget_incl_cls"], t["selected_with_cls"]
        tokens = VisualTokens(
            features=x,
            encoder_features=x,
            cls_token=t["hidden_states"][:, 0],
            saliency=t["cls_attn_sum"][:, None],
        )
        given = {name: t[name] for name in ("absV", "group", "nms_kept_count", "quota")}
    else:
        tokens, keep, chosen = (
            VisualTokens(features=t["features"][None]),
            case["budget"],
            t["selected"][None],
        )
        given = {name: t[name][None] for name in ("absV", "group", "nms_kept_count", "quota")}
    x = tokens.encoder_features if tokens.encoder_features is not None else tokens.features
    shift = int(
        tokens.cls_token is not None
    )  # recorded indices count the CLS token as row 0, ours leave it out as -1

    # stage 1 depends on the build of torch in its last digits; stage 2 is checked from the recorded
    # components
    loadings = pruner.loadings(x, keep)
    top = given["absV"].topk(2).values
    clear = top[..., 0] - top[..., 1] > 2e-4
    stage2 = pruner.allocate(x, given["absV"], tokens.saliency, keep)
    ours, theirs = loadings.argmax(2), given["group"]
    picks = stage2.picks.sort(1).values if case["path"] == "qwen" and keep > 150 else stage2.picks
    results = [
        Comparison("absV", loadings, given["absV"], atol=1e-4),
        Comparison("group", ours[clear], theirs[clear]),
        Comparison("group, from the recorded components", given["absV"].argmax(2), theirs),
        Comparison("nms_kept_count", stage2.survivors, given["nms_kept_count"]),
        Comparison("quota", stage2.quota, given["quota"]),
        Comparison("rho", stage2.redundancy, t["rho"]),
        Comparison("selected, from the recorded groups", picks + shift, chosen[:, shift:]),
    ]
    ranked = case["path"] == "llava" or torch.equal(
        *(top_k(v.amax(2), x.shape[1]) for v in (loadings, given["absV"]))
    )
    if torch.equal(ours, theirs) and ranked:  # then the whole has to agree as well
        whole = _run(pruner, tokens, keep)
        results.append(Comparison("selected", whole.indices + shift, chosen))
        if whole.features is not None:
            rows = chosen[..., None].expand_as(whole.features)
            results.append(
                Comparison("features", whole.features, t["hidden_states"].gather(1, rows))
            )
    return results


@golden("zspaprune")
def _zspaprune(case: Case, t: Tensors) -> list[Comparison]:
    options = {"core_ratio": case["core_ratio"], "diversity_rule": case["rule"]}
    tokens = VisualTokens(features=t["visual"][None], text_embeddings=t["text"][None])
    keep, count = _budget(case, tokens)
    picked = build("zspaprune", order="picked", **options)
    results = [
        Comparison("score", picked.relevance(tokens)[0], t["score"]),
        Comparison(
            "sorted", build("zspaprune", **options).prune(tokens, keep).indices[0], t["sorted"]
        ),
    ]
    if keep < count:
        order = picked.prune(tokens, keep).indices[0]
        results += [
            Comparison("core", order[: case["n_core"]], t["core"]),
            Comparison("order", order, t["order"]),
        ]
    return results


@golden("sppruner")
def _sppruner(case: Case, t: Tensors) -> list[Comparison]:
    pruner = build("sppruner", relevance_space="given")
    tokens = VisualTokens(
        features=t["visual"][None],
        grid=(case["H"], case["W"]),
        saliency=t["saliency"][None, None],
        relevance=t["relevance"][None],
    )
    keep, count = _budget(case, tokens)
    if keep == count:
        return _untouched(pruner.prune(tokens, keep), pruner.phi(tokens), t)
    selection, stages = pruner.prune(tokens, keep), pruner.stages(tokens, keep)
    return [
        *_focus_and_context(selection, stages.phi, stages.focus[0], stages.context[0], t),
        *_merges(stages.merged[0], stages.anchors[0], t),
    ]


@golden("fsr")
def _fsr(case: Case, t: Tensors) -> list[Comparison]:
    pruner = build("fsr", relevance_space="given")
    tokens = VisualTokens(
        features=t["visual"][None],
        encoder_features=t["visual"][None],
        saliency=t["saliency"][None, None],
        relevance=t["relevance"][None],
    )
    keep, count = _budget(case, tokens)
    if keep == count:
        return _untouched(pruner.prune(tokens, keep), pruner.focus_score(tokens), t)
    selection, stages = pruner.prune(tokens, keep), pruner.stages(tokens, keep)
    picks, focus = stages.picks[0], int(stages.focus_count)
    return [
        *_focus_and_context(selection, stages.phi, picks[:focus], picks[focus:], t),
        *_merges(stages.merged[0], stages.anchors[0], t),
    ]


def _focus_and_context(
    selection: Selection, phi: Tensor, focus: Tensor, context: Tensor, t: Tensors
) -> list[Comparison]:
    assert selection.features is not None
    return [
        Comparison("phi", phi[0], t["phi"]),
        Comparison("focus", focus, t["focus"]),
        Comparison("context", context, t["context"]),
        Comparison("sorted", selection.indices[0], t["sorted"]),
        Comparison("tokens", selection.features[0], t["tokens"]),
    ]


def _untouched(selection: Selection, phi: Tensor, t: Tensors) -> list[Comparison]:
    return [
        Comparison("phi", phi[0], t["phi"]),
        Comparison("sorted", selection.indices[0], t["sorted"]),
        Comparison("tokens", t["visual"][selection.indices[0]], t["tokens"]),
    ]


def _merges(merged: Tensor, anchors: Tensor, t: Tensors) -> list[Comparison]:
    real = merged >= 0
    return [
        Comparison("merged_src", merged[real], t["merged_src"]),
        Comparison("merged_dst", anchors[real], t["merged_dst"]),
    ]


@golden("divprune")
def _divprune(case: Case, t: Tensors) -> list[Comparison]:
    tokens = VisualTokens(features=t["features"][None])
    keep, count = _budget(case, tokens)
    results = [Comparison("sorted", build("divprune").prune(tokens, keep).indices[0], t["sorted"])]
    if keep < count:
        order = build("divprune", order="picked").prune(tokens, keep).indices[0]
        results.append(Comparison("order", order, t["order"]))
    return results


@golden("cdpruner")
def _cdpruner(case: Case, t: Tensors) -> list[Comparison]:
    batch = len(t["image_features"])
    tokens = VisualTokens(
        features=t["image_features"],
        clip_patches=t["image_embeds"],
        clip_text=t["text_embeds"].expand(batch, -1, -1),
        image_of_row=(0,) * batch,  # crops of one image
    )
    (keep, count), picked = (
        _budget(case, tokens, "budget_per_crop"),
        build("cdpruner", order="picked"),
    )
    results = [
        Comparison("relevance", picked.relevance(tokens), t["relevance"]),
        Comparison("sorted", build("cdpruner").prune(tokens, keep).indices, t["sorted"]),
    ]
    if keep < count:
        results.append(Comparison("order", picked.prune(tokens, keep).indices, t["order"]))
    return results
