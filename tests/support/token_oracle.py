"""Token-level fusion once more: plain loops over texts and dense distributions, to compare with.

Nothing here and in token_speakers.py is the program's: not its alignment, maps, fusions, losses,
tokens or files. Every distribution is one over the whole vocabulary.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from support.token_speakers import Match, Said, Span, Speaker, half, match, vocabulary_map


@dataclass
class Target:
    """What sources say of one token: masses of sets of ids, and of all others."""

    masses: dict[tuple[int, ...], float]
    tail: float
    source: str


@dataclass
class Lesson:
    """All targets of a response; texts cut differently with log-prob and weight; values."""

    targets: dict[int, Target] = field(default_factory=dict)
    chunks: list[tuple[Span, float, float]] = field(default_factory=list)
    values: dict[int, list[list[float]]] = field(default_factory=dict)


@dataclass
class Teacher:
    """A source as it takes part: its name, weight, domains, model and what its ids mean."""

    name: str
    speaker: Speaker
    weight: float = 1.0
    domains: tuple[str, ...] | None = None


@dataclass
class Oracle:
    """Fuses and computes losses; options named as the commands' flags."""

    pivot: Speaker
    teachers: list[Teacher]
    fusion: str = "mince"
    ambiguous: str = "digits"
    ce_per: str = "byte"
    top_k: int = 6
    scored_k: int = 6
    score: str = "last"
    tail: str = "ghost"
    lm_weight: float = 0.9
    chunk_weight: float = 1.0
    chunk_temperature: float = 100.0
    uld_weight: float = 1.5
    uld_temperature: float = 1.0
    standardisation: str = "unbiased"

    def teach(self, record: dict[str, Any], own: Said) -> Lesson:
        """Align and fuse what teachers say of a record's chosen reply."""
        starts = self.ambiguous == "group"
        present = []
        for teacher in self.teachers:
            if teacher.domains is not None and record["domain"] not in teacher.domains:
                continue
            with torch.no_grad():
                said = teacher.speaker.say(record["messages"], self.score)
            if teacher.speaker is self.pivot:
                found: Match | None = Match([(t, t) for t in range(len(own.ids))])
            else:
                found = match(own.pieces, said.pieces, starts=starts)
            if found is not None:
                nats = -sum(said.values)
                units = len(b"".join(said.pieces)) if self.ce_per == "byte" else len(said.ids)
                ids = self.map_of(teacher)
                present.append((teacher, said, found, nats / units, ids))
        lesson = Lesson()
        if not present:
            return lesson
        if self.fusion == "none":
            return self._side_by_side(present, lesson)
        ces = [p[3] for p in present]
        if self.fusion == "mince":
            best = min(range(len(ces)), key=lambda i: ces[i])
            shares = [float(i == best) for i in range(len(ces))]
        elif self.fusion == "average-ce":
            scores = [math.exp(math.exp(-ce)) for ce in ces]
            shares = [s / sum(scores) for s in scores]
        else:
            shares = [p[0].weight / sum(q[0].weight for q in present) for p in present]
        for t in range(len(own.ids)):
            lesson_of_t = [
                (share, p, dict(p[2].rows)[t])
                for share, p in zip(shares, present, strict=True)
                if share > 0 and t in dict(p[2].rows)
            ]
            target = self._target(lesson_of_t) if lesson_of_t else None
            if target is not None and target.masses:
                lesson.targets[t] = target
        spoken = []  # of each source its tokens with a row or in a chunk
        for _, _, found, _, _ in present:
            rows = {t for t, _ in found.rows if t in lesson.targets}
            spoken.append(rows.union(*(range(*span) for span, _ in found.chunks)))
        for share, (_, said, found, _, _) in zip(shares, present, strict=True):
            for span, (first, end) in found.chunks if share > 0 else ():
                there = [s for s, t in zip(shares, spoken, strict=True) if t & {*range(*span)}]
                lesson.chunks.append((span, sum(said.values[first:end]), share / sum(there)))
        return lesson

    def map_of(self, teacher: Teacher) -> dict[int, tuple[int, ...]]:
        """What a teacher's ids mean, found once."""
        if teacher.speaker is self.pivot:
            return {i: (i,) for i, _ in enumerate(self.pivot.pieces)}
        key = (teacher.name, self.ambiguous)
        known = self.__dict__.setdefault("_maps", {})
        if key not in known:
            known[key] = vocabulary_map(teacher.speaker, self.pivot, self.ambiguous)
        return known[key]

    def _side_by_side(self, present: list, lesson: Lesson) -> Lesson:
        for _, said, found, _, _ in present:
            top = said.top(self.scored_k)
            for t, u in found.rows:
                values = [value for _, value in top[u][: self.top_k]]
                lesson.values.setdefault(t, []).append(values)
        return lesson

    def _target(self, said_here: list) -> Target:
        total = sum(share for share, _, _ in said_here)
        masses: dict[tuple[int, ...], float] = {}
        for share, (_, said, _, _, ids), u in said_here:
            for number, value in said.top(self.scored_k)[u]:
                if number in ids:
                    mass = share / total * math.exp(value)
                    masses[ids[number]] = masses.get(ids[number], 0.0) + mass
        kept = dict(sorted(masses.items(), key=lambda item: (-item[1], item[0]))[: self.top_k])
        # As float16 keeps it; then it sums to one again.
        tail = math.exp(half(math.log(max(1 - sum(kept.values()), 1e-300))))
        kept = {ids: math.exp(half(math.log(mass))) for ids, mass in kept.items()}
        whole = tail + sum(kept.values())
        name = said_here[0][1][0].name if len(said_here) == 1 else "several"
        return Target({ids: m / whole for ids, m in kept.items()}, tail / whole, name)

    def first_loss(self, records: list[dict[str, Any]]) -> dict[str, float]:
        """Return every metric of a step of all records at once, and "norm" of its gradient."""
        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        losses, tokens = [], 0
        for record in records:
            own = self.pivot.say(record["messages"], self.score)
            lesson = self.teach(record, own)
            parts = self._parts(own, lesson)
            losses.append(parts["loss"][0])
            tokens += len(own.ids)
            for name, (value, count) in parts.items():
                names = [name]
                if name != "chunk":
                    names.append(f"domain/{record['domain']}/{name}")
                for each in names:
                    sums[each] = sums.get(each, 0.0) + float(torch.as_tensor(value).detach())
                    counts[each] = counts.get(each, 0.0) + count
        self.pivot.model.zero_grad()
        (sum(losses) / tokens).backward()
        found = {name: sums[name] / counts[name] for name in sums if counts[name]}
        grads = [p.grad for p in self.pivot.model.parameters() if p.grad is not None]
        found["norm"] = math.sqrt(sum(float((g**2).sum()) for g in grads))
        return found

    def _parts(self, own: Said, lesson: Lesson) -> dict[str, tuple[Any, float]]:
        """Sums over a response's tokens, and what they are means of."""
        K = len(own.ids)
        ce = [-own.logps[t, i] for t, i in enumerate(own.ids)]
        zero = ce[0] * 0
        parts: dict[str, tuple[Any, float]] = {"ce": (sum(ce), K)}
        if self.fusion == "none":
            far = {t: self._uld(own.logps[t], values) for t, values in lesson.values.items()}
            parts["loss"] = (sum(ce) + self.uld_weight * sum(far.values(), zero), K)
            parts["distance"] = (sum(far.values(), zero), len(far))
            parts["taught"] = (len(far), K)
            return parts
        loss, distance = zero, zero
        for t in range(K):
            if t not in lesson.targets:
                loss = loss + ce[t]
                continue
            kl = self._kl(own.logps[t], lesson.targets[t])
            loss = loss + self.lm_weight * ce[t] + (1 - self.lm_weight) * kl
            distance = distance + kl
        chunk = zero
        for (first, end), logp, weight in lesson.chunks:
            tau = self.chunk_temperature
            teacher = math.exp(logp / tau)
            student = torch.exp(-sum(ce[first:end], zero) / tau)
            one = teacher * torch.log(teacher / student)
            other = (1 - teacher) * torch.log((1 - teacher) / (1 - student))
            chunk = chunk + weight * tau * (one + other)
        loss = loss + (1 - self.lm_weight) * self.chunk_weight * chunk
        taught = len(lesson.targets)
        parts |= {"loss": (loss, K), "distance": (distance, taught), "taught": (taught, K)}
        parts["chunk"] = (chunk, sum(weight for _, _, weight in lesson.chunks))
        for name in [*(teacher.name for teacher in self.teachers), "several"]:
            mine = sum(target.source == name for target in lesson.targets.values())
            parts[f"share/{name}"] = (mine, taught)
        return parts

    def _kl(self, logps: torch.Tensor, target: Target) -> torch.Tensor:
        q = logps.exp()
        masses, tail = target.masses, target.tail
        if self.tail == "renormalised":
            whole = sum(masses.values())
            masses, tail = {ids: m / whole for ids, m in masses.items()}, 0.0
        found, rest = logps[0] * 0, torch.ones((), dtype=torch.float64)
        for ids, mass in masses.items():
            mine = q[list(ids)].sum()
            found = found + mass * (math.log(mass) - mine.log())
            rest = rest - mine
        return found if tail == 0 else found + tail * (math.log(tail) - rest.log())

    def _uld(self, logps: torch.Tensor, values: list[list[float]]) -> torch.Tensor:
        mine = torch.sort(logps, descending=True).values[: self.top_k]
        far = [self._shape(mine) - self._shape(torch.tensor(v, dtype=torch.float64))
               for v in values]  # fmt: skip
        return torch.stack([one.abs().sum() for one in far]).sum() / len(far)

    def _shape(self, values: torch.Tensor) -> torch.Tensor:
        if self.standardisation != "none":
            deviation = values - values.mean()
            by = len(values) - (self.standardisation == "unbiased")
            values = deviation / torch.sqrt((deviation**2).sum() / by)
        return torch.softmax(values / self.uld_temperature, dim=0)


def conversations(path: Path) -> list[dict[str, Any]]:
    """Read records: of each its domain, and the conversation that is trained on."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        prompt = record["prompt"]
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if "responses" in record:
            best = max(range(len(record["responses"])), key=record["scores"].__getitem__)
            reply = record["responses"][best]
        else:
            reply = record["chosen"]
        if isinstance(reply, str):
            reply = [{"role": "assistant", "content": reply}]
        found.append({"domain": record["domain"], "messages": [*prompt, *reply]})
    return found
