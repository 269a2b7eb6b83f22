"""Which rank does this task need? A sweep from Python, read as a DataFrame.

    python examples/compare_ranks.py        # a few seconds on a CPU; nothing is downloaded

The cells (`# %%`) open as a notebook in VS Code, PyCharm and Jupytext.
"""

# %% Train two ranks with two seeds each.
import lora_bench
from lora_bench.api import compare, sweep, train

small = {"model": "tiny_bert", "data": "toy", "data.train_rows": 64, "data.validation_rows": 32}
short = {"trainer.max_steps": 8, "trainer.batch_size": 8, "trainer.device": "cpu"}
folders = sweep(adapter={"rank": [1, 4]}, seed=[0, 1], quiet=True, **small, **short)

# %% One row for each rank: mean and standard deviation over the seeds.
table = compare(folders, by="adapter.rank")
print(table[["adapter.rank", "n", "mcc", "mcc_std", "params.adapter"]].to_string(index=False))

# %% Train one more run with the best rank; it returns its folder and its record.
run = train(adapter={"rank": int(table["adapter.rank"][0])}, seed=2, quiet=True, **small, **short)
print(f"{run.folder}: validation MCC {run.metrics['validation/mcc']:.3f}")

# %% Predict with it: the probability that each pair is a duplicate.
pairs = [("How do I learn Go?", "What is the best way to learn Go?"), ("How do I learn Go?", "Is it raining?")]
print(lora_bench.load(run.folder).predict(pairs))
