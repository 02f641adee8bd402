"""An IPython startup file for the notebook tests only: what a widget's callback raises fails the notebook.

`interact`, `interactive` and `with Output():` show an exception inside the widget and go on, so that a notebook whose
slider is broken looks as if it had run. In these kernels they raise.
"""

import ipywidgets

_update = ipywidgets.interactive.update
_exit = ipywidgets.Output.__exit__


def update(self, *args):
    function, raised = self.f, []

    def remembering(**settings):
        try:
            return function(**settings)
        except Exception as error:
            raised.append(error)
            raise

    self.f = remembering
    try:
        _update(self, *args)
    finally:
        self.f = function
    if raised:
        raise raised[0]


def leave(self, kind, error, trace):
    _exit(self, None, None, None)  # returning nothing lets the exception out


ipywidgets.interactive.update = update
ipywidgets.Output.__exit__ = leave
