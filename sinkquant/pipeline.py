"""detect -> plan -> quantize -> save -> evaluate -> report: the whole job, one artifact after the other."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.artifacts import Plan, Report, SinkMap
from sinkquant.artifacts.report import Fidelity
from sinkquant.detect import detect
from sinkquant.errors import RequestError
from sinkquant.evaluate import BASELINE, Candidate, evaluate, require_tasks_possible
from sinkquant.formats import load_dense, quantize_to, read_checkpoint, require_free, versions
from sinkquant.models import (
    Decoder,
    load_model,
    load_tokenizer,
    open_model,
    pick_device,
    read_text,
    resolve,
    token_rows,
)
from sinkquant.policy import make_control, make_plan
from sinkquant.recipe import Recipe
from sinkquant.report import write

Progress = Callable[[int, int, str], None]
DEFAULT_RECIPE = "w4a16-sink"
LOG = logging.getLogger("sinkquant")


def plan(model: PreTrainedModel, sink_map: SinkMap, recipe: Recipe | None = None) -> Plan:
    """The sink-aware plan of a model in memory.

    Raises:
        RequestError: the sink map is of another model, or the recipe does not fit it.
    """
    return make_plan(Decoder.of(model).shape(sink_map.model.name), sink_map, recipe or Recipe.load(DEFAULT_RECIPE))


def run(recipe: Recipe | str | os.PathLike[str] = DEFAULT_RECIPE, model: str = "demo",
        output: str | os.PathLike[str] = "out", *, plan_only: bool = False, resume: bool = False,
        trust_remote_code: bool = False, progress: Progress | None = None) -> Report | None:
    """Do what a recipe says, from model to report.

    Everything is written into `<output>.partial`, which is renamed at the end. With `resume` that folder is kept when
    the run fails, and a run with the same recipe and model continues after the last finished artifact.

    Returns:
        the report; None with `plan_only`, which stops before anything is quantized.

    Raises:
        RequestError: the request is wrong; found before any compute is spent where that is possible.
        SinkquantError: the work failed.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    target = Path(output)
    require_free(target)
    folder = resolve(model)
    tokenizer = load_tokenizer(folder, trust_remote_code)
    pick_device(recipe.compute.device)
    read_text(recipe.calibration.text, "calibration")
    if not plan_only:
        require_tasks_possible(recipe)
    with _work_folder(target, _key(recipe, folder), resume) as work, _log_file(work):
        job = _Job(recipe, model, folder, tokenizer, work, trust_remote_code, progress)
        report = job.run(plan_only)
    return report


class _Job:
    """One run. Every method makes one artifact, or reads the one that an interrupted run left."""

    def __init__(self, recipe: Recipe, name: str, folder: Path, tokenizer: PreTrainedTokenizerBase, work: Path,
                 trust_remote_code: bool, progress: Progress | None) -> None:
        self.recipe, self.name, self.folder, self.tokenizer, self.work = recipe, name, folder, tokenizer, work
        self.trust_remote_code, self.progress = trust_remote_code, progress
        self.seconds: dict[str, float] = {}

    def run(self, plan_only: bool) -> Report | None:
        model = self.load()
        with self.timed("detect"):
            sink_map = self.sink_map(model)
        shape = Decoder.of(model).shape(self.name)
        aware = make_plan(shape, sink_map, self.recipe)
        self.require_calibration(model, aware)
        aware.save(self.work / "plan.json")
        LOG.info("plan: %.3f bits per weight, %d bytes", aware.bits_per_weight, aware.weight_bytes)
        if plan_only:
            return None
        plans = {"model": aware}
        if self.recipe.evaluate.control:
            plans["control"] = make_control(shape, sink_map, self.recipe, aware)
        del model
        after = {}
        for place, one in plans.items():
            with self.timed(f"quantize {one.name}"):
                self.checkpoint(place, one, sink_map)
                after[one.name] = self.look_again(place)
        with self.timed("evaluate"):
            report = self.evaluate(plans, sink_map, after)
        return write(self.work, report, sink_map, aware, after["sink_aware"])

    def load(self) -> PreTrainedModel:
        return open_model(self.folder, trust_remote_code=self.trust_remote_code)

    def sink_map(self, model: PreTrainedModel) -> SinkMap:
        path = self.work / "sinkmap.json"
        if path.is_file():
            return SinkMap.load(path)
        found = detect(model, self.tokenizer, recipe=self.recipe, name=self.name, progress=self.progress)
        found.save(path)
        LOG.info("detect: sink rate %s, %d sink tokens", found.sink_rate, len(found.tokens))
        return found

    def require_calibration(self, model: PreTrainedModel, aware: Plan) -> None:
        """The calibration text must hold a row before hours are spent on quantizing."""
        if any(decision.method == "gptq" for decision in aware.modules.values()):
            decoder, settings = Decoder.of(model), aware.calibration
            token_rows(self.tokenizer, read_text(settings.text, "calibration"), settings.rows,
                       min(settings.length, decoder.max_length), settings.bos, decoder.vocabulary)

    def checkpoint(self, place: str, one: Plan, sink_map: SinkMap) -> None:
        if (self.work / place).is_dir():
            return
        compute = self.recipe.compute
        quantize_to(self.work / place, self.load(), one, self.tokenizer, sink_map, self.recipe,
                    pick_device(compute.device), getattr(torch, compute.dtype), progress=self.progress)
        LOG.info("%s: %d bytes written", place, _weight_bytes(self.work / place))

    def look_again(self, place: str) -> SinkMap:
        """The sinks of a quantized checkpoint, without the ablations."""
        recipe = self.recipe.replace(["detect.super_weights=false", "detect.long_rows=0"])
        return detect(open_model(self.work / place), self.tokenizer, recipe=recipe, name=place, progress=self.progress)

    def evaluate(self, plans: dict[str, Plan], sink_map: SinkMap, after: dict[str, SinkMap]) -> Report:
        device, dtype = pick_device(self.recipe.compute.device), getattr(torch, self.recipe.compute.dtype)
        first = next(iter(plans.values()))
        candidates = [Candidate(
            BASELINE, self.name, lambda: load_model(self.folder, dtype, device, self.trust_remote_code),
            _weight_bytes(self.folder), 8.0 * _bytes_per_value(sink_map))]
        for place, one in plans.items():
            candidates.append(Candidate(one.name, place, _loader(self.work / place, dtype, device),
                                        _weight_bytes(self.work / place), one.bits_per_weight))
        report = evaluate(candidates, self.tokenizer, self.recipe, model=self.name,
                          fidelity=fidelity({BASELINE: sink_map} | after), progress=self.progress)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        resources = {f"seconds: {stage}": seconds for stage, seconds in self.seconds.items()}
        return report.model_copy(update={"versions": versions(), "resources": resources | {
            "peak resident bytes": float(peak), "bytes predicted": float(first.weight_bytes)}})

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[stage] = round(time.monotonic() - start, 3)
        LOG.info("%s took %.1f s", stage, self.seconds[stage])


def evaluate_folder(folder: Path, recipe: Recipe, baseline: str | None,
                    progress: Progress | None = None) -> tuple[Report, SinkMap | None, Plan | None]:
    """Measure a checkpoint, or a run's folder with its control, beside a baseline.

    Raises:
        RequestError: the folder holds no checkpoint.
    """
    is_run = (folder / "model" / "config.json").is_file()
    places = {"sink_aware": folder / "model", "control": folder / "control"} if is_run else {"sink_aware": folder}
    places = {name: path for name, path in places.items() if path.is_dir()}
    tokenizer = load_tokenizer(resolve(str(places["sink_aware"])) if places else folder)
    device, dtype = pick_device(recipe.compute.device), getattr(torch, recipe.compute.dtype)
    candidates = []
    if baseline is not None:
        source = resolve(baseline)
        candidates.append(Candidate(BASELINE, baseline, lambda: load_model(source, dtype, device),
                                    _weight_bytes(source), 16.0))
    sink_map, first = None, None
    for name, path in places.items():
        content = read_checkpoint(resolve(str(path))) or {}
        if first is None:
            sink_map, first = content.get("sink_map"), content.get("plan")
        bits = content["plan"].bits_per_weight if content else 16.0
        candidates.append(Candidate(name, str(path), _loader(path, dtype, device), _weight_bytes(path), bits))
    report = evaluate(candidates, tokenizer, recipe, model=baseline or str(folder), progress=progress)
    return report.model_copy(update={"versions": versions()}), sink_map, first


def fidelity(maps: dict[str, SinkMap]) -> Fidelity:
    """Sink rates and the largest massive activation of several models on the same rows."""
    def largest(sink_map: SinkMap, field: str) -> float:
        return max((float(getattr(channel, field)) for channel in sink_map.channels), default=0.0)

    return Fidelity(sink_rate={name: one.sink_rate for name, one in maps.items()},
                    massive_peak={name: largest(one, "peak") for name, one in maps.items()},
                    massive_ratio={name: largest(one, "ratio") for name, one in maps.items()})


def _loader(path: Path, dtype: torch.dtype, device: str) -> Callable[[], PreTrainedModel]:
    return lambda: load_dense(path, dtype, device)


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _bytes_per_value(sink_map: SinkMap) -> float:
    return 4.0 if sink_map.model.dtype == "float32" else 2.0


def _key(recipe: Recipe, folder: Path) -> str:
    """A hash of all that decides the result: recipe, model files, texts."""
    digest = hashlib.sha256(json.dumps(recipe.model_dump(mode="json"), sort_keys=True).encode())
    for path in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.json")):
        digest.update(f"{path.name}:{path.stat().st_size}:{path.stat().st_mtime_ns};".encode())
    for text in (recipe.calibration.text, recipe.evaluate.text):
        digest.update(Path(text).read_bytes() if text else b"packaged")
    return digest.hexdigest()


@contextlib.contextmanager
def _work_folder(target: Path, key: str, resume: bool) -> Iterator[Path]:
    """`<target>.partial` while the run goes on, `target` once it is done."""
    work = target.with_name(f"{target.name}.partial")
    manifest = work / "manifest.json"
    if resume and manifest.is_file():
        if json.loads(manifest.read_text(encoding="utf-8")).get("key") != key:
            raise RequestError(f"{work} was made with another recipe, model or text; remove it or run without "
                               "--resume.")
    else:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        manifest.write_text(json.dumps({"schema": "sinkquant/manifest@1", "key": key}) + "\n", encoding="utf-8")
    try:
        yield work
        manifest.unlink()
        if target.is_dir():
            target.rmdir()
        work.rename(target)
    except BaseException:
        if not resume:
            shutil.rmtree(work, ignore_errors=True)
        raise


@contextlib.contextmanager
def _log_file(work: Path) -> Iterator[None]:
    handler = logging.FileHandler(work / "run.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    level = LOG.level
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOG.removeHandler(handler)
        LOG.setLevel(level)
        handler.close()
