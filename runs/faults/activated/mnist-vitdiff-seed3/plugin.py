"""A fault of the published comparison: the logits go through GELU and dropout of 0.1 before the loss."""

from torch.nn import functional as F

import vit

forward = vit.ViT.forward
vit.ViT.forward = lambda model, images: F.dropout(F.gelu(forward(model, images)), 0.1, model.training)
