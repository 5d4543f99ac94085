"""A demo report with curves as real ones fall, for the tests of the report and for looking at it."""

from __future__ import annotations

import math

from tenfold.study.report import ArmReport, CurvePoint, DemoReport, Sample, ratios

PROMPT = " = River Tyne = \n\n The river"
TEXT = (
    " was first crossed in 1862 , when the second army of the north had been sent to the city in order to "
    "take the bridge and the small fort above it . It was the first of the two to be built in the county .\n "
    "The song was released as a single in the United Kingdom , where it reached number five ."
)
HOSTILE = ' <unk> & the "end"</blockquote><script>alert(1)</script>'


def curve(
    steps: int, tokens: int, floor: float, gain: float, flops: float, seconds: float
) -> list[CurvePoint]:
    """Losses that fall as a power of the tokens, and a little more as the learning rate decays."""
    points = [CurvePoint(tokens=0, flops=0.0, seconds=0.0, validation_loss=9.01)]
    for step in range(1, steps + 1):
        share = step / steps
        seen = round(tokens * share)
        loss = floor + gain * (seen / 1e6) ** -0.55 - 0.12 * max(0.0, share - 0.35)
        points.append(
            CurvePoint(
                tokens=seen, flops=flops * share, seconds=seconds * share, validation_loss=min(loss, 8.5)
            )
        )
    return points


def router_load(layers: int, experts: int) -> list[list[float]]:
    """Loads from even in the first layer to skewed in the last, where two experts are dead."""
    rows = []
    for layer in range(layers):
        weights = [math.exp(0.25 * layer * math.sin(7.0 * e + layer)) for e in range(experts)]
        if layer == layers - 1:
            weights[3] = weights[5] = 0.0
        rows.append([w / sum(weights) for w in weights])
    return rows


def arm(name: str, *, floor: float, gain: float, tokens: int, flops: float, seconds: float) -> ArmReport:
    """One arm; N1 is sparse."""
    sparse = name == "N1"
    points = curve(24, tokens, floor, gain, flops, seconds)
    return ArmReport(
        name=name,
        title={"D0": "dense, as before", "D2": "dense, our recipe", "N1": "hybrid and sparse"}[name],
        description={
            "D0": "Qwen3 dense, 8 layers of 256, AdamW, cosine, 80 tokens per parameter.",
            "D2": "Qwen3 dense, 6 layers of 256, Muon, warmup-stable-decay, compute-optimal.",
            "N1": "Qwen3-Next: three layers of Gated DeltaNet to one of gated attention, 4 of 64 experts and "
            "a shared one, zero-centred norms, Muon, warmup-stable-decay.",
        }[name],
        optimizer="AdamW" if name == "D0" else "Muon and AdamW",
        schedule="cosine" if name == "D0" else "warmup-stable-decay",
        learning_rate=3e-3 if name == "D0" else 0.02,
        parameters_total=38_400_000 if sparse else 9_800_000,
        parameters_active=6_100_000 if sparse else 9_800_000,
        tokens=tokens,
        flops=flops,
        optimizer_flops=flops * (1e-6 if name == "D0" else 0.031),
        seconds_steps=seconds,
        seconds_total=seconds * 1.08 + 14,
        tokens_per_second=tokens / seconds,
        gflops_per_second=flops / seconds / 1e9,
        utilisation=flops / seconds / 1e9 / 92.0,
        peak_memory_gb=2.31 if sparse else 1.24,
        final_validation_loss=points[-1].validation_loss,
        curve=points,
        train_curve=[
            (
                t,
                min(9.0, floor + gain * (t / 1e6) ** -0.55 - 0.12 * max(0.0, t / tokens - 0.35))
                + 0.09 * math.sin(t * 1.7),
            )
            for t in range(tokens // 600, tokens + 1, tokens // 600)
        ],
        samples=[
            Sample(prompt=PROMPT, text=TEXT[: 90 + 70 * len(name)]),
            Sample(prompt="The <b>", text=HOSTILE + TEXT[:120]),
        ],
        router_load=router_load(8, 64) if sparse else [],
        checkpoint=f"runs/demo/{name.lower()}/step-00002400",
    )


def demo_report(*, new_floor: float = 3.02) -> DemoReport:
    """The report; with a high `new_floor` the new arm never reaches the dense ones."""
    arms = [
        arm("D0", floor=3.06, gain=3.2, tokens=60_000_000, flops=4.1e15, seconds=72_000.0),
        arm("D2", floor=3.08, gain=2.3, tokens=20_000_000, flops=1.25e15, seconds=23_000.0),
        arm("N1", floor=new_floor, gain=1.95, tokens=20_000_000, flops=7.4e14, seconds=17_300.0),
    ]
    return DemoReport(
        tenfold_version="0.1.0",
        torch_version="2.13.0",
        date="2026-01-17",
        machine="AMD EPYC 7B13, 16 cores, 64 GB",
        threads=16,
        matmul_peak_gflops=92.0,
        precision="float32",
        seed=0,
        corpus="WikiText-2 raw",
        tokenizer_vocab=8192,
        sequence_length=512,
        validation_tokens=246_000,
        arms=arms,
        ratios=ratios(arms),
        caveats=["Learning rates were tuned in three trials for each arm, no more."],
    )
