import sys
from pathlib import Path

from training.settings import FULL, QUICK
from training.stages import train

if __name__ == "__main__":
    recipe = QUICK if "--quick" in sys.argv else FULL
    train(recipe, Path(sys.argv[1]), "--resume" in sys.argv)
