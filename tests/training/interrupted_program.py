"""What test_resume.py kills: a program that trains, straightens and distils, and is started again
until it is done.

    python interrupted_program.py FOLDER

runs it once undisturbed in FOLDER/whole; then in FOLDER/killed, under SIGKILL at random moments.
Prints how often it was killed. Children are forked, so that the interpreter starts once.
"""

import os
import random
import signal
import sys
import time

import torch

from rfkernels import models
from rfkernels.data import toy
from rfkernels.training import DistillConfig, ReflowConfig, TrainConfig, distill, reflow, train_flow

MOST_KILLS = 60


def program(folder):
    def train(steps):
        return TrainConfig(
            steps=steps, batch_size=8, checkpoint_every=6, log_every=5, label_dropout=0.2
        )

    model = models.build(
        "mlp", seed=1, sample_shape=(2,), width=16, depth=1, num_classes=2, dropout=0.2
    )
    train_flow(model, toy("moons", 50), train(45), run=f"{folder}/first", resume=True)
    config = ReflowConfig(pairs=64, pair_batch=4, pair_steps=3, guidance_scale=2.0, train=train(30))
    reflow(f"{folder}/first", config, run=f"{folder}/second", resume=True)
    distill(
        f"{folder}/second",
        DistillConfig(k=2, train=train(20)),
        pairs=f"{folder}/second/pairs",
        run=f"{folder}/third",
        resume=True,
    )


def start(folder):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            program(folder)
            code = 0
        finally:
            os._exit(code)
    return child


def finish(child):
    _, status = os.waitpid(child, 0)
    if status:
        sys.exit(f"a child that nobody killed ended with status {status}")


def main(root):
    torch.set_num_threads(1)
    program(f"{root}/warm")  # imports and caches, so that the delays below fall into the run itself
    begun = time.monotonic()
    finish(start(f"{root}/whole"))
    lasted = time.monotonic() - begun
    rng, kills = random.Random(0), 0
    while kills < MOST_KILLS:
        child = start(f"{root}/killed")
        deadline = time.monotonic() + rng.uniform(0.02, 0.35) * lasted
        while time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                if status:
                    sys.exit(f"a child that nobody killed ended with status {status}")
                return kills
            time.sleep(0.0005)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
    finish(start(f"{root}/killed"))
    return kills


if __name__ == "__main__":
    print(main(sys.argv[1]))
