"""Training and evaluation on mmengine's Runner. The only package that imports mmengine."""

from vizattn.engine.evaluate import Trained, as_published, evaluate, load_trained
from vizattn.engine.recipes import list_recipes, load_recipe
from vizattn.engine.train import Result, train

__all__ = ["Result", "Trained", "as_published", "evaluate", "list_recipes", "load_recipe", "load_trained", "train"]
