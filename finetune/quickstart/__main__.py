import sys

from finetune.quickstart.demo import main

if __name__ == "__main__":
    sys.exit(main())
