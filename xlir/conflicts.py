"""Fields of a configuration that are valid by themselves, but not together."""

from collections.abc import Iterator, Mapping

from input_pipeline import datasets

# Losses that can process images in chunks, because they do not search for a hardest negative.
CHUNKED_LOSSES = ("infonce", "sigmoid", "distill")


def conflicts(config: Mapping) -> Iterator[str]:
    """Messages about fields that are valid by themselves, but not together."""
    mesh, loss, text, image = (config[group] for group in ("mesh", "loss", "text", "image"))
    yield from _init_conflicts(config)
    if mesh["data"] == mesh["fsdp"] == -1:
        yield "config.mesh.data and config.mesh.fsdp are both -1; only one may be"
    for name, test_set in config["evals"].items():
        if test_set.get("type", "folder") == "folder" and not test_set.get("captions"):
            yield f"config.evals.{name}.captions is empty; it must be the folder of its captions"
    if loss["chunk"] and (loss["name"] not in CHUNKED_LOSSES or loss["push_apart"]):
        needs = loss["name"] if loss["name"] not in CHUNKED_LOSSES else "push_apart"
        yield (
            f"config.loss.chunk={loss['chunk']} works only with {', '.join(CHUNKED_LOSSES)}: "
            f"{needs} searches the whole batch for its hardest negative"
        )
    if loss["name"] == "m3l" and not loss["image_weight"] + loss["text_weight"]:
        yield "config.loss.image_weight and text_weight are both 0: m3l has nothing to learn from"
    yield from _distillation_conflicts(config)
    yield from _shards_conflicts(config)
    if text["tower"] == "muse" and (text["prefix"] or text["trim_vocab"] or text["pack"]):
        yield "config.text.prefix, trim_vocab and pack do not apply to mUSE"
    if text["frozen"] and text["pack"]:
        yield (
            "config.text.pack needs a trained tower, --config.text.frozen=False: the outputs of a "
            "frozen tower are computed only once"
        )
    if image["frozen"] and (image["min_area"] or image["mirror"]):
        yield (
            "config.image.min_area and mirror need a trained tower, --config.image.frozen=False: "
            "the outputs of a frozen tower are computed only once"
        )
    if config["average"] and text["frozen"] and image["frozen"]:
        yield "config.average needs a trained tower, such as --config.text.frozen=False"
    for side, options in (("text", text), ("image", image)):
        if options["head"] == "center" and not options["frozen"]:
            yield f"config.{side}.head is 'center', which needs a frozen tower"


def _init_conflicts(config: Mapping) -> Iterator[str]:
    """Messages about `init` and the sides that continue those of another run."""
    unnamed = [side for side in ("text", "image") if not config[side]["tower"]]
    if not config["init"]:
        for side in unnamed:
            yield (
                f"config.{side}.tower is ''; it must be the name of a tower, unless config.init "
                "names a run to start from"
            )
    elif not unnamed:
        yield (
            f"config.init is {config['init']!r}; it must be empty where both towers are named, "
            "because no side would start from that run"
        )
    if config["text"]["trim_vocab"] and "text" in unnamed:
        yield (
            "config.text.trim_vocab must be empty where the text side continues that of "
            "config.init, whose vocabulary can't be trimmed"
        )


def _shards_conflicts(config: Mapping) -> Iterator[str]:
    """Messages about fields that need a data set in memory, or that only shards have."""
    data = config["data"]
    weights, splits = data["weights"], data["train"].split("+")
    if data["name"] not in datasets.STREAMED:
        if weights:
            yield f"config.data.weights is {weights}; it must be () unless config.data.name=shards"
        return
    if weights and len(weights) != len(splits):
        yield (
            f"config.data.weights has {len(weights)} numbers; it must have one for each of the "
            f"{len(splits)} splits of config.data.train={data['train']}"
        )
    for side in ("text", "image"):
        if config[side]["head"] == "center":
            yield (
                f"config.{side}.head is 'center', which needs the tower's outputs for all training "
                f"data; with config.data.name={data['name']} they are not kept: choose another head"
            )
    if config["text"]["pack"]:
        yield (
            f"config.text.pack must be False with config.data.name={data['name']}: the lengths of "
            "all captions would have to be kept"
        )
    if config["teacher"]:
        yield (
            f"config.teacher must be empty with config.data.name={data['name']}: the teacher's "
            "embeddings of all captions would have to be kept"
        )


def _distillation_conflicts(config: Mapping) -> Iterator[str]:
    """Messages about the fields of a teacher."""
    loss, data, weight = config["loss"], config["data"]["name"], config["loss"]["distill"]
    alone = loss["name"] == "distill"
    if (alone or weight) and not config["teacher"]:
        needing = "config.loss.name=distill" if alone else f"config.loss.distill={weight}"
        yield f"config.teacher is ''; it must be the folder of a run, for {needing}"
    if alone and weight:
        yield f"config.loss.distill is {weight}; it must be 0 with the loss 'distill' itself"
    elif config["teacher"] and not (alone or weight):
        yield (
            f"config.loss.distill is {weight}; it must be above 0 for config.teacher to have an "
            "effect (or set --config.loss.name=distill)"
        )
    if alone and not loss["push_apart"] and not config["image"]["frozen"]:
        yield (
            "config.image.frozen is False; it must be True, because the loss 'distill' trains only "
            "the text side"
        )
    if data not in datasets.WITHOUT_PHOTOS:
        return
    if not alone or loss["push_apart"]:
        yield (
            f"config.data.name is {data!r}, which has no photos: set --config.loss.name=distill "
            "and --config.loss.push_apart=0"
        )
    for name, test_set in config["evals"].items():
        if test_set.get("type", "folder") == "split":
            yield f"config.evals.{name} is a split of {data!r}, which has no photos to test on"
