"""Writes the bundled tasks' files again: python experiments/nano/freeze.py"""

from recipe.freeze import main

if __name__ == "__main__":
    main()
