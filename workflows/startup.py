"""Imported by every script before all else: the modules that follow make two million objects, none of them garbage.

To look for cycles among them takes a fifth of the time of the imports; `cli.execute` begins with it again.
"""

import gc

gc.disable()
