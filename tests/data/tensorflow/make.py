"""`model.ckpt-7.*` and `values.npz`: named as by google-research/electra, saved by TensorFlow 1's Saver.

python make.py FOLDER      # needs tensorflow, which the tests do not
"""

from __future__ import annotations

import sys

import numpy as np
import tensorflow.compat.v1 as tf

WIDTH, GENERATOR, EMBEDDING, VOCABULARY, POSITIONS, LAYERS = 16, 8, 8, 20, 12, 2
rng = np.random.default_rng(0)
values = {}


def variable(name: str, *shape: int) -> None:
    values[name] = (rng.standard_normal(shape) * 0.2).astype(np.float32)
    tf.Variable(values[name], name=name)


def dense(name: str, inputs: int, outputs: int) -> None:
    variable(f"{name}/kernel", inputs, outputs)
    variable(f"{name}/bias", outputs)


def norm(name: str, width: int) -> None:
    variable(f"{name}/gamma", width)
    variable(f"{name}/beta", width)


def encoder(scope: str, width: int) -> None:
    if width != EMBEDDING:
        dense(f"{scope}/embeddings_project", EMBEDDING, width)
    for number in range(LAYERS):
        layer = f"{scope}/encoder/layer_{number}"
        for name in ("query", "key", "value"):
            dense(f"{layer}/attention/self/{name}", width, width)
        dense(f"{layer}/attention/output/dense", width, width)
        norm(f"{layer}/attention/output/LayerNorm", width)
        dense(f"{layer}/intermediate/dense", width, 4 * width)
        dense(f"{layer}/output/dense", 4 * width, width)
        norm(f"{layer}/output/LayerNorm", width)


tf.disable_eager_execution()
for name, rows in (("word", VOCABULARY), ("token_type", 2), ("position", POSITIONS)):
    variable(f"electra/embeddings/{name}_embeddings", rows, EMBEDDING)
norm("electra/embeddings/LayerNorm", EMBEDDING)
encoder("electra", WIDTH)
encoder("generator", GENERATOR)
dense("generator_predictions/dense", GENERATOR, EMBEDDING)
norm("generator_predictions/LayerNorm", EMBEDDING)
variable("generator_predictions/output_bias", VOCABULARY)
dense("discriminator_predictions/dense", WIDTH, WIDTH)
dense("discriminator_predictions/dense_1", WIDTH, 1)
variable("electra/embeddings/word_embeddings/adam_m", VOCABULARY, EMBEDDING)
values["global_step"] = np.int64(7)
tf.Variable(values["global_step"], name="global_step")
with tf.Session() as session:
    session.run(tf.global_variables_initializer())
    tf.train.Saver().save(session, f"{sys.argv[1]}/model.ckpt", global_step=7, write_meta_graph=False)
np.savez_compressed(f"{sys.argv[1]}/values.npz", **values)
