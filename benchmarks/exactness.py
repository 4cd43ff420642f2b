"""How far the last bits lie apart: swapless and transformers' other ways to run experts, against eager at one thread.

    python benchmarks/exactness.py            # every family, ten minutes of processor time
    python benchmarks/exactness.py --families olmoe gpt_oss --no-store

Swapless promises the bits of ``experts_implementation="eager"`` at one thread. transformers itself does not agree with them:
its default implementation (grouped_mm where it is supported) multiplies in another order, and more threads cut products
into other pieces. This measures how much, on tiny random models of every family that the tests find, in bf16 and float32, and
on one OLMoE of more usual sizes (``olmoe, wide``), since products as small as the tiny ones are hardly ever cut.

A row holds, for each contestant, the largest absolute difference of logits in prefill and in the greedy decode steps up to and
including the first in which a sequence takes another token, and whether all tokens agree; and the same of swapless against
eager where both have two threads. Zero means every bit. Logits of these models have a standard deviation of ``logit_std``.
Nothing here is timed, so there are no repeats: a second run gives the same figures, which ``deterministic`` checks on the
reference.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the tiny families live beside the tests that discover them

import torch  # noqa: E402
import transformers  # noqa: E402
from results import document, emit, store  # noqa: E402

import swapless  # noqa: E402
from tests.families.compare import Prompts, Run, prompts, reference, run  # noqa: E402
from tests.families.tiny import NOT_RUN, clone_weights, decorated_families, tiny_model  # noqa: E402

DTYPES = ("bfloat16", "float32")
RESIDENT = 0.25
WIDE = "olmoe, wide"


class Contestant(NamedTuple):
    """Who runs the experts, and on how many threads; ``implementation`` None is transformers' own choice."""

    name: str
    swapless: bool
    implementation: str | None
    threads: int


REFERENCE = Contestant("eager, 1 thread", False, "eager", 1)
CONTESTANTS = (
    Contestant("swapless, 1 thread", True, None, 1),
    Contestant("eager, 2 threads", False, "eager", 2),
    Contestant("swapless, 2 threads", True, None, 2),
    Contestant("default, 1 thread", False, None, 1),
    Contestant("default, 2 threads", False, None, 2),
)


def wide_olmoe() -> Any:
    """Random OLMoE of two layers whose products are large enough to be cut among threads: about 110 MB in bf16."""
    sizes = {"hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 16}
    shape = {"num_experts": 16, "num_experts_per_tok": 4, "vocab_size": 1024, "max_position_embeddings": 256}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(1)
    return transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**sizes, **shape, **ids)).eval()


def difference(got: Run, expected: Run) -> dict[str, Any]:
    """Largest differences of two runs; decode counts only while both have been fed the same tokens."""
    new = expected.steps.shape[1]
    same_so_far = (got.tokens == expected.tokens)[:, -new:].cumprod(1).bool()
    fed_the_same = torch.cat([torch.ones_like(same_so_far[:, :1]), same_so_far[:, :-1]], 1)
    decode = (got.steps.double() - expected.steps.double()).abs().amax(-1)[fed_the_same]
    prefill = (got.prefill.double() - expected.prefill.double()).abs()
    return {
        "prefill_max_abs": prefill.max().item(),
        "decode_max_abs": decode.max().item(),
        "bit_identical": torch.equal(got.prefill, expected.prefill) and torch.equal(got.steps, expected.steps),
        "tokens_agree": torch.equal(got.tokens, expected.tokens),
    }


def measure(name: str, dtype: str, folder: Path, cls: Any, given: Prompts) -> dict[str, Any]:
    """One row: the reference twice, and every contestant against it."""
    models = {"eager": reference(folder, cls), None: clone_weights(cls.from_pretrained(folder).eval())}
    chosen = str(models[None].config.get_text_config()._experts_implementation)
    torch.set_num_threads(REFERENCE.threads)
    expected = run(models["eager"], given)
    again = run(models["eager"], given)
    row: dict[str, Any] = {
        "family": name,
        "dtype": dtype,
        "default_implementation": chosen,
        "logit_std": expected.prefill.double().std().item(),
        "deterministic": torch.equal(again.prefill, expected.prefill) and torch.equal(again.steps, expected.steps),
        "contestants": {},
    }
    runs = {}
    with swapless.load(folder, resident=RESIDENT, context=64) as ours:
        for contestant in CONTESTANTS:
            torch.set_num_threads(contestant.threads)
            runs[contestant.name] = run(ours if contestant.swapless else models[contestant.implementation], given)
            row["contestants"][contestant.name] = difference(runs[contestant.name], expected)
    row["swapless_against_eager_at_2_threads"] = difference(runs["swapless, 2 threads"], runs["eager, 2 threads"])
    return row


def rows(families: list[str]) -> list[dict[str, Any]]:
    """Every family in every type, printed as it comes."""
    print(f"{'family':22s} {'type':9s}" + "".join(f"{contestant.name:>22s}" for contestant in CONTESTANTS), file=sys.stderr)
    measured = []
    for name in families:
        for dtype in DTYPES:
            model = (wide_olmoe() if name == WIDE else tiny_model(decorated_families()[name])).to(getattr(torch, dtype))
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                given = prompts(left_padded=False, vocabulary=128)
                row = measure(name, dtype, Path(folder), type(model), given)
            measured.append(row)
            cells = (_cell(row["contestants"][contestant.name]) for contestant in CONTESTANTS)
            print(f"{name:22s} {dtype:9s}" + "".join(f"{cell:>22s}" for cell in cells), file=sys.stderr)
    return measured


def _cell(found: dict[str, Any]) -> str:
    if found["bit_identical"]:
        return "identical"
    largest = max(found["prefill_max_abs"], found["decode_max_abs"])
    return f"{largest:.1e}, {'same' if found['tokens_agree'] else 'OTHER'} tokens"


def summary(measured: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each contestant: rows in which every bit, and every token, agrees; the largest difference in units of logit_std."""
    found = {}
    for contestant in CONTESTANTS:
        results = [(row["contestants"][contestant.name], row["logit_std"]) for row in measured]
        found[contestant.name] = {
            "rows": len(results),
            "bit_identical": sum(result["bit_identical"] for result, _ in results),
            "tokens_agree": sum(result["tokens_agree"] for result, _ in results),
            "largest_in_logit_std": max(max(r["prefill_max_abs"], r["decode_max_abs"]) / std for r, std in results),
        }
    return found


def main() -> int:
    """Measure, print the table to stderr and one document to stdout; exit 1 if our promise at one thread does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = [*sorted(decorated_families().keys() - NOT_RUN.keys()), WIDE]
    parser.add_argument("--families", nargs="+", choices=known, default=known, metavar="NAME", help="only these")
    parser.add_argument("--no-store", action="store_true", help="keep no result file")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")
    measured = rows(arguments.families)
    totals = summary(measured)
    for name, figures in totals.items():
        print(
            f"{name:22s} {figures['bit_identical']:4d} of {figures['rows']} rows identical, tokens agree in "
            f"{figures['tokens_agree']}, largest difference {figures['largest_in_logit_std']:.1e} of the logits' deviation",
            file=sys.stderr,
        )
    alike = sum(row["swapless_against_eager_at_2_threads"]["bit_identical"] for row in measured)
    print(f"swapless against eager, both at 2 threads: {alike} of {len(measured)} rows identical", file=sys.stderr)
    config = {"resident": RESIDENT, "dtypes": list(DTYPES), "reference": REFERENCE.name, "not_run": NOT_RUN}
    result = document("exactness", config=config, measured={"summary": totals, "rows": measured})
    emit(result)
    if not arguments.no_store:
        print(f"stored as {store(result).name}", file=sys.stderr)
    return 0 if totals[CONTESTANTS[0].name]["bit_identical"] == len(measured) else 1


if __name__ == "__main__":
    sys.exit(main())
