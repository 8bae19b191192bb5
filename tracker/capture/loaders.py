"""Code that is saved with a model, and that predicts from arrays without this project."""

FILES = "extra_files"
"""The folder of a model's extra files; the name is mlflow.pytorch's."""

LOADER = f'''

def _load_pyfunc(folder: str) -> object:
    """Called by mlflow.pyfunc.load_model with the model's folder."""
    import mlflow.pytorch
    from pathlib import Path

    files = {{path.name: path.read_text("utf-8") for path in Path(folder, {FILES!r}).glob("*")}}
    return load(mlflow.pytorch.load_model(folder), files)
'''

# Arrays by name in and out, for calls that MLflow's own loader does not know.
PREDICTOR = '''"""Predicts with a network that takes or returns more than one array."""

import numpy as np
import torch
from torch.utils import _pytree as pytree

INPUTS = {inputs!r}  # (name, None) of an array, or (None, value) of a constant
OUTPUTS = {outputs!r}


def load(network, files):
    return Predictor(network)


class Predictor:
    def __init__(self, network):
        self.network = network

    def predict(self, inputs, params=None):
        leaves = [self.leaf(inputs, *each) for each in INPUTS]
        args, kwargs = pytree.tree_unflatten(leaves, self.network._in_spec)
        with torch.no_grad():
            leaves = pytree.tree_leaves(self.network(*args, **kwargs))
        arrays = dict(zip(OUTPUTS, map(self.array, leaves)))
        return arrays[""] if list(arrays) == [""] else arrays

    def leaf(self, inputs, name, constant):
        if name is None:
            return constant
        is_named = hasattr(inputs, "keys")
        return torch.from_numpy(np.array(inputs[name] if is_named else inputs))

    def array(self, leaf):
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return (leaf.float() if leaf.dtype == torch.bfloat16 else leaf).numpy()
'''
