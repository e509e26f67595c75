"""Train on handwritten digits with Ray Train, on clones of its workers.

    python -m pip install "keras_clones[examples,ray]"
    python examples/ray_digits.py

starts Ray on this machine, with two workers. Ray tells each of the cluster by
`TF_CONFIG`: the first drives the clones of all, the others serve it. Metrics
and a checkpoint of every epoch are reported to Ray, and a worker that dies has
Ray start them all again (`--kill` shows it), to go on from the checkpoint.
"""

import argparse
import os
import pathlib
import signal
import sys
import tempfile
import threading

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import ray
from ray.train import (
    Checkpoint,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    get_checkpoint,
    get_context,
    report,
)
from ray.train.tensorflow import TensorflowTrainer

HERE = str(pathlib.Path(__file__).resolve().parent)


def train_on_worker(config):
    """Train in the first worker of Ray; serve it in the others."""
    sys.path.append(config["examples"])
    import keras_clones

    first = 0
    if get_checkpoint() is not None:
        with get_checkpoint().as_directory() as folder:
            first = int(pathlib.Path(folder, "epoch").read_text()) + 1
    if get_context().get_world_rank() == 0:
        keras_clones.connect()
        drive(config, first)
        # The process lives on in Ray, and so would those that serve it.
        keras_clones.disconnect()
        return
    serving = threading.Thread(
        target=keras_clones.connect, kwargs={"exit": False}
    )
    serving.start()
    # A report waits for those of all workers.
    for _ in range(first, config["epochs"]):
        report({})
    serving.join()


def drive(config, first):
    """Train on the clones of all workers, from an epoch on."""
    import keras
    from digits import load_data, make_model

    from keras_clones import clone_model, deployment

    keras.utils.set_random_seed(0)
    (x, y), (x_test, y_test) = load_data()
    model = clone_model(make_model())
    print(deployment(model))
    model.compile(
        keras.optimizers.Adam(2e-3),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    if first:
        with get_checkpoint().as_directory() as folder:
            model.load_weights(pathlib.Path(folder, "digits.weights.h5"))
        print(f"goes on at epoch {first + 1}")

    def tell(epoch, logs):
        struck = pathlib.Path(config["folder"], "killed")
        if config["kill"] and epoch == 2 and not struck.exists():
            struck.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        with tempfile.TemporaryDirectory() as folder:
            model.save_weights(pathlib.Path(folder, "digits.weights.h5"))
            pathlib.Path(folder, "epoch").write_text(str(epoch))
            found = {name: float(value) for name, value in logs.items()}
            report(found, checkpoint=Checkpoint.from_directory(folder))

    model.fit(
        x,
        y,
        batch_size=config["batch_size"],
        initial_epoch=first,
        epochs=config["epochs"],
        validation_data=(x_test, y_test),
        # Ray's own callback needs Keras 2.
        callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=tell)],
        verbose=2,
    )


def train(epochs, batch_size, folder, kill=False, workers=2):
    """Train with Ray; return the metrics of the last epoch."""
    folder = pathlib.Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    trainer = TensorflowTrainer(
        train_on_worker,
        train_loop_config={
            "epochs": epochs,
            "batch_size": batch_size,
            "examples": HERE,
            "folder": str(folder),
            "kill": kill,
        },
        scaling_config=ScalingConfig(num_workers=workers),
        run_config=RunConfig(
            name="digits",
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=1),
        ),
    )
    return trainer.fit().metrics


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--folder", default="ray_digits")
    parser.add_argument(
        "--kill", action="store_true", help="kill a worker in the third epoch"
    )
    args = parser.parse_args()
    ray.init(include_dashboard=False)
    found = train(args.epochs, args.batch_size, args.folder, args.kill)
    print(f"validation accuracy: {found['val_accuracy']:.2%}")


if __name__ == "__main__":
    main()
