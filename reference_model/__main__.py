# SPDX-License-Identifier: Apache-2.0
"""`python -m m2n.reference_model` is m2n-generate."""

import sys

from .generate import main

sys.exit(main())
