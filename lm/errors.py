"""The one exception that means: the user can mend this."""


class UserError(Exception):
  """A user's mistake, told in one sentence: the value, the rule, the fix."""
