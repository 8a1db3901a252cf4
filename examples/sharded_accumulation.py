"""Two gradients, gradient accumulation, and a batch that is sharded over 8 devices.

The 8 devices are simulated on the CPU, so this runs anywhere. To use real devices,
remove the two lines that configure jax.

Needs optax_tricks[nnx] and scikit-learn.
"""

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

import optax_tricks
from optax_tricks.nnx import batch_gradients, split

digits = load_digits()
inputs = jnp.array(digits.data / 16, jnp.float32)  # (1797, 64)
labels = jnp.array(digits.target)


class Network(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 128, rngs=rngs)
        self.norm = nnx.LayerNorm(128, rngs=rngs)
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, inputs):
        return self.head(nnx.relu(self.norm(self.hidden(inputs))))


def loss_fn(model, batch):
    inputs, labels = batch
    logits = model(inputs)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), None


def train(num_devices, grad_accum_steps):
    mesh = jax.make_mesh(
        (num_devices,),
        ("data",),
        axis_types=(AxisType.Auto,),
        devices=jax.devices()[:num_devices],
    )
    replicated = NamedSharding(mesh, P())
    over_examples = NamedSharding(mesh, P("data"))

    graphdef, params, model_state = split(Network(nnx.Rngs(0)))
    tx = optax_tricks.pugd(optax.cosine_decay_schedule(0.1, 100))
    state = (params, model_state, tx.init(params))
    state = jax.device_put(state, replicated)

    @jax.jit
    def step(state, batch):
        params, model_state, opt_state = state
        # Both gradients are those of all 96 examples, part by part.
        out = batch_gradients(
            loss_fn,
            graphdef,
            params,
            model_state,
            batch,
            grad_accum_steps=grad_accum_steps,
        )
        updates, opt_state = tx.update(
            out.grads, opt_state, params, grad_fn=out.grad_fn
        )
        params = optax.apply_updates(params, updates)
        return (params, out.model_state, opt_state), out.loss

    for epoch in range(10):
        order = jax.random.permutation(jax.random.key(epoch), 960)
        for rows in order.reshape(-1, 96):
            batch = jax.device_put((inputs[rows], labels[rows]), over_examples)
            state, loss = step(state, batch)
    model = nnx.merge(graphdef, state[0], state[1])
    test_inputs = jax.device_put(inputs[1000:], replicated)
    accuracy = jnp.mean(model(test_inputs).argmax(-1) == labels[1000:])
    return float(loss), float(accuracy)


loss, accuracy = train(num_devices=1, grad_accum_steps=1)
print(f"1 device, whole batches: loss {loss:.4f}, test accuracy {accuracy:.3f}")
loss, accuracy = train(num_devices=8, grad_accum_steps=4)
print(f"8 devices, 4 parts: loss {loss:.4f}, test accuracy {accuracy:.3f}")
