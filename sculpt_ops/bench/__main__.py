"""`python -m sculpt_ops.bench`."""

from .command import main

raise SystemExit(main())
