"""`python -m peft_sae` is `peft-sae`."""

from .cli import main

if __name__ == "__main__":
    main()
