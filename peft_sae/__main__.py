"""`python -m peft_sae` is `peft-sae`, and runs a script that is named in place of a command."""

from .cli import main_of_module

if __name__ == "__main__":
    main_of_module()
