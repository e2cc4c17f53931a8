#!/usr/bin/env bash
# Makes .venv with the package and the extras named (none, or such as "test" or "test,parity"),
# unless they stand already. Source it: it leaves .venv activated.
setup_venv() {
  local extras="${1:-}" root stamp python
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
  python="${PYTHON:-python3}"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $("$python" --version) is too old; name a Python >= 3.11 by PYTHON=" >&2
    return 2
  }
  [ -x "$root/.venv/bin/python" ] || "$python" -m venv "$root/.venv" || return
  # shellcheck disable=SC1091
  source "$root/.venv/bin/activate"
  stamp="$root/.venv/installed-${extras:-core}"
  if ! cmp -s "$stamp" <(cat "$root/setup.cfg" "$root/constraints.txt"); then
    echo "installing lm${extras:+[$extras]} into .venv" >&2
    python -m pip install --quiet --disable-pip-version-check \
      -c "$root/constraints.txt" -e "$root${extras:+[$extras]}" || return
    cat "$root/setup.cfg" "$root/constraints.txt" > "$stamp"
  fi
}
