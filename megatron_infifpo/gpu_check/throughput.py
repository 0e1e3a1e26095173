"""Group 8: bfloat16 steps of whole models, as many layers as fit, beside TRL's and Liger's."""

import dataclasses
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_infifpo.bench.jobs import write_pairs
from megatron_infifpo.bench.step import (
    LIGER,
    TRL,
    StepJob,
    installed,
    measure_step,
    model_operations,
)
from megatron_infifpo.gpu_check import processes
from megatron_infifpo.gpu_check.records import MISSED, Options, Recorder, Result
from megatron_infifpo.gpu_check.shapes import SHAPES, make_pairs, save_shape
from megatron_infifpo.planning.layout import Layout
from megatron_infifpo.planning.plan import GIB, Memory, Plan

# Dense bfloat16 products, TFLOP/s, as NVIDIA states them; the first pattern that is found.
PEAKS = (
    (r"H100 PCIe", 756.0),
    (r"H100 NVL", 835.0),
    (r"H[128]00", 989.5),
    (r"\bH20\b", 148.0),
    (r"B[23]00", 2250.0),
    (r"A[18]00", 312.0),
    (r"L40S", 362.0),
    (r"\bA10\b", 125.0),
)
# What an H100 must reach with the 7B shape.
MFU, FASTER, SMALLER = 0.40, 2.5, 0.6
LOSS = 0.05  # by how much first losses may differ, in bfloat16
OURS = "shared prompt"
FREE = 0.85  # of the free memory, to be filled by what is counted on paper
# Peers keep float32 weights, gradients and two moments, and weights cast to bfloat16; what a layer
# of transformers keeps of a token is about twice what one of this program does.
PEER_BYTES, PEER_KEPT = 18, 2.0
LARGEST_SAVE = 12 * GIB
NO_PADDING_FREE = (
    "TRL has none since 0.29; 0.28 does not import beside the transformers 5 of this program"
)


@dataclass(frozen=True)
class Work:
    """What a step of a shape is: pairs, pairs at once, and tokens of a prompt and of a response."""

    pairs: int
    at_once: int
    prompt: int
    response: int
    steps: int = 3

    @property
    def text(self) -> int:
        """Tokens of a text."""
        return self.prompt + self.response

    @property
    def row(self) -> int:
        """Tokens of a row with shared prompts."""
        return self.at_once * (self.prompt + 2 * self.response)


WORK = {
    "0.5b": Work(16, 4, 1024, 1024),
    "7b": Work(8, 2, 1024, 1024),
    "tiny": Work(4, 2, 24, 24, steps=1),
}


def check(options: Options, record: Recorder) -> None:
    """Measure every shape."""
    for shape in options.shapes[:1] if options.quick else options.shapes:
        Shape(options, record, shape).check()


class Shape:
    """Measurements of one shape."""

    def __init__(self, options: Options, record: Recorder, shape: str):
        """Take what to measure and where to."""
        self.options, self.record, self.shape = options, record, shape
        self.work, self.whole = WORK[shape], SHAPES[shape]["num_hidden_layers"]
        self.folder = Path(options.folder) / shape
        self.found: dict[str, dict[str, float]] = {}
        self.gpu = torch.cuda.get_device_name() if options.cuda else "cpu"

    def check(self) -> None:
        """Prepare the model, run every method, compare."""
        layers = self.fitting_layers()
        if layers == 0:
            self.record.skip(f"{self.shape}: a step", f"not one layer fits {self.gpu}")
            return
        self.name = f"{self.shape}, {layers} of {self.whole} layers"
        with self.record.check(f"{self.name}: saved and imported"):
            self.prepare(layers)
        if not (self.folder / "pivot").exists():
            return
        self.plan = self.make_plan(layers)
        for method in (OURS,) if self.options.quick and self.options.cuda else (OURS, TRL, LIGER):
            self.run(method)
        self.record.skip(f"{self.name}: {TRL} without padding", NO_PADDING_FREE)
        if OURS in self.found:
            self.ours()
            for peer in (TRL, LIGER):
                if peer in self.found:
                    self.beside(peer)
        shutil.rmtree(self.folder, ignore_errors=True)

    def make_plan(self, layers: int) -> Plan:
        """Plan the shape with so many layers, of the kind that a run would choose here."""
        from megatron_infifpo.families import megatron_args
        from megatron_infifpo.gpu_check.kinds import default_kind

        config = SHAPES[self.shape] | {"num_hidden_layers": layers}
        kept = default_kind(bf16=True).traits.kept
        return Plan(megatron_args(config), "bf16", kept)

    def planned(self, plan: Plan) -> Memory:
        """What the planner counts for a step, and for a save."""
        from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE

        work = self.work
        return plan.memory(
            Layout(1, 1, 1),
            work.row,
            work.pairs // work.at_once,
            gathered=2 * work.text * work.at_once / work.row,
            fused_adam=HAVE_APEX_OR_TE,
        )

    def fitting_layers(self) -> int:
        """As many layers as fit the GPU, in this program and in its peers."""
        if not self.options.cuda:
            return self.whole
        room = FREE * torch.cuda.mem_get_info()[0]
        for layers in range(self.whole, 0, -1):
            plan = self.make_plan(layers)
            tokens = 2 * self.work.at_once * self.work.text
            kept = PEER_KEPT * layers * plan.activations.of_layer() * tokens
            logits = 6.0 * tokens * plan.sizes.vocabulary  # in bfloat16, then in float32
            states = PEER_BYTES * plan.sizes.parameters
            peers = states + kept + logits if installed(TRL) else 0.0
            if max(self.planned(plan).total, peers) <= room:
                return layers
        return 0

    def prepare(self, layers: int) -> None:
        """Save random weights, import them, write pairs."""
        from megatron_infifpo.convert.hf_import import import_checkpoint
        from megatron_infifpo.tokens.tokenization import ChatTokenizer

        model, work = self.folder / "hf", self.work
        save_shape(model, self.shape, layers, self.options.device)
        if self.options.cuda:
            torch.cuda.empty_cache()  # the methods' processes need it
        records = make_pairs(work.pairs, work.prompt, work.response)
        write_pairs(records, ChatTokenizer.from_pretrained(model), self.folder)
        import_checkpoint(model, self.folder / "pivot")

    @property
    def job(self) -> StepJob:
        """What is measured."""
        work = self.work
        return StepJob(
            model=str(self.folder / "hf"),
            folder=str(self.folder),
            pairs=work.pairs,
            longest=work.text,
            micro_batch=work.at_once,
            peer_batch=work.at_once,
            steps=work.steps,
            bf16=True,
            mixed=True,
        )

    def flags(self) -> list[str]:
        """Flags of our run; it saves at its end where the disk takes it."""
        flags = ["--use-distributed-optimizer"]
        size = 14 * self.plan.sizes.parameters
        if size <= LARGEST_SAVE and 3 * size <= shutil.disk_usage(self.folder).free:
            flags += ["--save", str(self.folder / "run")]
            flags += ["--save-interval", str(self.work.steps + 1)]
        return flags

    def run(self, method: str) -> None:
        """Run a method in a process of its own."""
        if not installed(method):
            self.record.skip(f"{self.name}: {method}", f"{method} is not installed")
            return
        flags = self.flags() if method == OURS else []
        title = "step" if method == OURS else f"{method}'s step"
        with self.record.check(f"{self.name}: {title}", unit="s") as result:
            self.found[method] = processes.run(
                "megatron_infifpo.gpu_check.throughput:measure",
                [method, dataclasses.asdict(self.job), flags],
                self.folder / method.replace(" ", "-"),
                seconds=self.options.seconds / 3,
            )[0]
            result.value = self.found[method]["seconds"]

    def figure(self, name: str, value: float, unit: str, note: str = "") -> None:
        """Record a figure of the shape."""
        self.record.figure(f"{self.name}: {name}", value, unit, note)

    def limited(self, name: str, value: float, limit: float, unit: str, at_least: bool) -> None:
        """Record a figure that is promised for an H100, with the 7B shape."""
        judged = self.shape == "7b" and "H100" in self.gpu
        result = Result(value, limit if judged else None)
        self.record.result(
            f"{self.name}: {name}", result, unit=unit, at_least=at_least, otherwise=MISSED
        )

    def ours(self) -> None:
        """Record what our steps reach, and their memory beside the planner's."""
        found, work = self.found[OURS], self.work
        rate = work.pairs / found["seconds"]
        self.figure("pairs", rate, "pairs/s", f"texts of {work.text} tokens")
        self.figure("tokens of rows", rate * work.row / work.at_once, "tokens/s")
        reached = model_operations(self.job, shared=True) / found["seconds"]
        peak = peak_rate(self.gpu)
        self.limited("MFU", reached / (peak or found["peak"]), MFU, "of peak", at_least=True)
        self.figure("large products", found["peak"] / 1e12, "TFLOP/s")
        self.figure("peak memory", found["mib"], "MiB")
        if self.options.cuda:
            planned, mib = self.planned(self.plan), 2**20
            self.figure("peak beside the plan's", found["mib"] * mib / planned.total, "ratio")
            if "--save" in self.flags():
                lasting = planned.weights + planned.gradients + planned.optimizer
                ratio = found["later_mib"] * mib / (lasting + planned.save)
                self.figure("peak memory of a save", found["later_mib"], "MiB")
                self.figure("a save's peak beside the plan's", ratio, "ratio")
            else:
                reason = f"a checkpoint of {14 * self.plan.sizes.parameters / GIB:.0f} GiB"
                self.record.skip(f"{self.name}: peak memory of a save", reason)

    def beside(self, peer: str) -> None:
        """Compare with a peer that took the same pairs, as many at once."""
        ours, other = self.found[OURS], self.found[peer]
        ratio = other["seconds"] / ours["seconds"]
        if peer == TRL:
            self.limited(f"pairs/s beside {peer}", ratio, FASTER, "ratio", at_least=True)
            loss = Result(abs(ours["loss"] - other["loss"]), LOSS)
            self.record.result(f"{self.name}: first loss beside {peer}'s", loss, unit="nats")
        else:
            self.figure(f"pairs/s beside {peer}", ratio, "ratio")
        if not self.options.cuda:
            return
        self.figure(f"{peer}'s peak memory", other["mib"], "MiB")
        if peer == TRL:
            memory = ours["mib"] / other["mib"]
            self.limited(f"memory beside {peer}", memory, SMALLER, "ratio", at_least=False)
        else:
            self.figure(f"memory beside {peer}", ours["mib"] / other["mib"], "ratio")
        # On one GPU nothing of the optimizer is sharded: it outweighs all that a method can save.
        beyond = [max(1.0, found["mib"] - found["kept_mib"]) for found in (ours, other)]
        name = f"memory beyond weights, gradients and optimizer beside {peer}"
        self.figure(name, beyond[0] / beyond[1], "ratio")


def peak_rate(gpu: str) -> float | None:
    """FLOP/s of bfloat16 products that a GPU's maker states; None if it is not listed."""
    for pattern, tflops in PEAKS:
        if re.search(pattern, gpu):
            return tflops * 1e12
    return None


def measure(argument: list[Any]) -> dict[str, float]:
    """Take the steps of a method in this process: `[name, StepJob, flags]`."""
    name, job, flags = argument
    return measure_step(name, StepJob(**job), *flags)
