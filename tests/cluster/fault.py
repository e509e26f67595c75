"""Strike another task of the cluster while the controller trains.

    fault.py SIGNAL JOB

prints what `fit` raised and after how many seconds, then that the model can
be saved. Tasks write their process ids into the folder `FAULT_FOLDER`.
"""

import json
import os
import pathlib
import signal
import sys
import threading
import time

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import numpy as np

import keras_clones
from keras_clones import clone_model

FOLDER = pathlib.Path(os.environ["FAULT_FOLDER"])
TIMEOUT = 4.0


def main():
    number, victim = getattr(signal, sys.argv[1]), sys.argv[2]
    task = json.loads(os.environ["TF_CONFIG"])["task"]
    (FOLDER / task["type"]).write_text(str(os.getpid()))
    keras_clones.connect(timeout=20.0 if number == signal.SIGKILL else TIMEOUT)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    clone_model(model, variables="controller")
    model.compile("adam", "mse")
    x, y = np.ones((40, 8), "float32"), np.zeros((40, 4), "float32")
    struck = []

    def strike(epoch, logs):
        if epoch == 1:
            threading.Timer(0.5, later).start()

    def later():
        struck.append(time.monotonic())
        os.kill(int((FOLDER / victim).read_text()), number)

    callback = keras.callbacks.LambdaCallback(on_epoch_end=strike)
    try:
        model.fit(
            x, y, batch_size=4, epochs=10**6, verbose=0, callbacks=[callback]
        )
    except ConnectionError as error:
        seconds = time.monotonic() - struck[0]
        print("RAISED", json.dumps([seconds, str(error)]), flush=True)
    model.save(FOLDER / "kept.keras")
    kept = keras.saving.load_model(FOLDER / "kept.keras")
    np.testing.assert_array_equal(kept.get_weights()[0], model.get_weights()[0])
    print("SAVED", flush=True)


if __name__ == "__main__":
    main()
