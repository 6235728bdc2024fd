"`python -m ftlab` is the command `ftlab`"
import sys
from .cli import main

if __name__ == '__main__':
    sys.exit(main())
