import os

import torch


def is_saved_model(f):
    return os.path.isfile(os.path.join(f, "m.pt"))


def save_model(model, task, source, n, folder, overwrite=False):
    os.makedirs(folder, exist_ok=True)
    torch.save(model.state_dict(), folder + "/m.pt")
