"""`python -m kvcompile.lm_eval`: the name under which `kvcompile.integrations.lm_eval` is called."""

from kvcompile.integrations.lm_eval import KvcompileLM, main

__all__ = ["KvcompileLM", "main"]

if __name__ == "__main__":
    main()
