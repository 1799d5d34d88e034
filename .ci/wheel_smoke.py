"""What an installed wheel must do, run from a folder that is not the checkout (see `wheel_smoke.sh`)."""

import importlib.resources
import subprocess
import sys
from pathlib import Path

import timm
import torch

import vizattn

here = Path(__file__).parent
package = Path(vizattn.__file__).resolve()
assert package.is_relative_to(Path(sys.prefix).resolve()), f"vizattn was imported from {package}, not from the wheel"
assert (package.parent / "py.typed").is_file()

images = torch.randn(2, 3, 32, 32)
model = timm.create_model("vit_va_nano_patch4_32", pretrained=True, num_classes=10)
vizattn.attach(model, "vpt", num_tokens=4)
model.eval()
vizattn.save_adapter(model, here / "bundle")

again = timm.create_model("vit_va_nano_patch4_32", pretrained=True)
vizattn.load_adapter(again, here / "bundle")
again.eval()
with torch.no_grad():
    assert torch.equal(model(images), again(images)), "the loaded adapter computes something else than the saved one"

recipes = [p.name for p in (importlib.resources.files("vizattn.configs") / "classification").iterdir()]
assert sum(name.endswith(".py") and not name.startswith("_") for name in recipes) >= 3, f"recipes: {recipes}"

listed = subprocess.run(["vizattn", "list"], check=True, capture_output=True, text=True).stdout
assert "vit_va_nano_patch4_32" in listed and "packaged" in listed, listed
subprocess.run(["vizattn", "train", "--help"], check=True, capture_output=True)
print(f"The wheel works: vizattn {vizattn.__version__}, torch {torch.__version__}, timm {timm.__version__}")
