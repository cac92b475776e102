"""mergekit, with sorts that leave equals in their order.

    PYTHON peers/mergekit_stable_sort.py CONFIG.yml OUT [options of mergekit-yaml]

PYTHON is that of an environment with mergekit. `ties` and `breadcrumbs` keep the elements at the head of a sorted list;
which of several equal ones that are is the sort's affair, and torch's is not a stable one unless it is asked to be.
Nothing else is changed.
"""

from __future__ import annotations

from functools import partial

import torch
from mergekit.scripts.run_yaml import main

if __name__ == "__main__":
    torch.argsort = partial(torch.argsort, stable=True)
    torch.sort = partial(torch.sort, stable=True)
    main()
