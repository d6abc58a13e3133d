#!/usr/bin/env bash
# The ways to install apt_ext, each into an environment of its own, and what is said where one cannot work.
#
#   tests/install/run.sh [offline | all | CASE...]      (offline without an argument; `make installs` and .ci/run run that)
#
# Offline, nothing is fetched; torch is borrowed from the environment of PYTHON (default .venv/bin/python, which `make test` makes):
#   isolated      pip install ., build isolation, no index, and a torch 99 in reach that none may take
#   direct        pip install . --no-build-isolation
#   editable      pip install -e .
#   no-compiler   no g++: one sentence, nothing installed
#   no-torch      no torch and no index: pip says that torch is missing
#   other-torch   run with another torch than it was built for: a sentence before the library is loaded
#   sdist         the source distribution becomes a wheel, the wheel is installed, and where torch is missing its import says so
# From the package index (TORCH chooses the version):
#   fresh         torch is installed, then pip install . with the index in reach: no second torch
#   absent        pip install . fetches torch, once for the build and once to stay
#   uv            uv pip install . from a checkout
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
torch=${TORCH:-torch==2.13.0}
work=$root/build/install
tree=$work/tree # one copy, and one name for every environment: ninja compiles again only what another command would give
venv=$work/venv
template=$work/template
log=$work/log

offline="isolated direct editable no-compiler no-torch other-torch sdist"
online="fresh absent uv"

# -- what the cases are made of ----------------------------------------------------------------------------------------

# An environment with the packages of PYTHON's in reach, but as if they were its own; what is installed goes to it.
borrow() {
  bare
  site_of "$python" >"$site/borrowed.pth"
  ln -s "$(dirname "$python")/ninja" "$venv/bin/ninja"
}

bare() {
  rm -rf "$venv" "$log"
  cp -a "$template" "$venv"
  site=$(site_of "$venv/bin/python")
}

# Without the setuptools that Pythons before 3.12 put there, which may be too old.
make_template() {
  rm -rf "$template"
  "$python" -m venv "$template"
  local site
  site=$(site_of "$template/bin/python")
  rm -rf "$site"/setuptools* "$site"/pkg_resources "$site"/*distutils*
}

site_of() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@" >>"$log" 2>&1; }

# Whatever this machine's pip is told, by files or by variables, to find elsewhere.
no_index() {
  unset "${!PIP_@}"
  export PIP_CONFIG_FILE=/dev/null PIP_NO_INDEX=1
}

# Outside the tree, so that what is installed is what is imported; used, not only imported.
works() {
  (cd "$work" && "$venv/bin/python" -c '
import sys, torch, apt_ext
expected, place = sys.argv[1:]
assert torch.__version__.split("+")[0] == expected.split("+")[0], f"a second torch: {torch.__version__}"
assert apt_ext.__file__.startswith(place), apt_ext.__file__
assert apt_ext.ops.build_info()["torch_version"] == torch.__version__
adapter = apt_ext.APTAdapter(6, 4, rank=2)
adapter(torch.ones(3, 6)).sum().backward()
assert adapter.lora_B.grad.shape == (4, 2)' "$1" "${2:-$venv}" 2>>"$log")
}

torch_version() { "$python" -c 'import torch; print(torch.__version__)'; }

# fails WORDS COMMAND...: it must fail, and say WORDS
fails() {
  local words=$1 status=0
  shift
  "$@" >"$work/said" 2>&1 || status=$?
  cat "$work/said" >>"$log"
  [ $status != 0 ] || { echo "expected a failure of: $*" >>"$log"; return 1; }
  grep -qF -- "$words" "$work/said" || grep -qF -- "$words" "$log" || { echo "expected the words: $words" >>"$log"; return 1; }
}

nothing_installed() { [ -z "$(find "$site" -iname 'apt_ext*')" ]; }

# A torch that would be taken by whoever asked an index for torch.
decoy() {
  rm -rf "$work/decoy"
  mkdir -p "$work/decoy"
  "$python" - "$work/decoy" <<'END'
import sys, zipfile

name, place = "torch-99.0", sys.argv[1]
with zipfile.ZipFile(f"{place}/{name}-py3-none-any.whl", "w") as wheel:
    wheel.writestr("torch/__init__.py", "__version__ = '99.0'\n")
    wheel.writestr(f"{name}.dist-info/METADATA", "Metadata-Version: 2.1\nName: torch\nVersion: 99.0\n")
    wheel.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    wheel.writestr(f"{name}.dist-info/RECORD", "")
END
}

# -- offline -----------------------------------------------------------------------------------------------------------

isolated() {
  borrow
  decoy
  pip install --find-links "$work/decoy" "$tree"
  works "$(torch_version)"
  ! grep -q "torch-99" "$log"
  [ ! -e "$site/benchmarks" ]
  fails "results: expected a checkout of the repository" "$venv/bin/apt-ext" results --task movies
}

direct() {
  borrow
  pip install --no-build-isolation "$tree"
  works "$(torch_version)"
}

editable() {
  borrow
  pip install -e "$tree"
  works "$(torch_version)" "$tree"
  "$venv/bin/apt-ext" results --help >>"$log"
  pip uninstall -y apt_ext
  rm -f "$tree"/apt_ext/*.so "$tree"/apt_ext/_built_for.py
}

no-compiler() {
  borrow
  # Only what the environment itself has: no c++, no g++.
  fails "apt_ext: no C++ compiler was found (c++ or g++)" env -u CXX PATH="$venv/bin" "$venv/bin/python" -m pip install "$tree"
  nothing_installed
}

no-torch() {
  bare
  cp -r "$(site_of "$python")"/{setuptools*,*distutils*} "$site"
  fails "No matching distribution found for torch>=2.9" env PATH="$(dirname "$python"):$PATH" \
    "$venv/bin/python" -m pip install "$tree"
  nothing_installed
}

other-torch() {
  borrow
  pip install "$tree"
  # Nothing but a version: loading the library against it would be an undefined symbol.
  mkdir -p "$site/torch"
  echo "__version__ = '2.12.1'" >"$site/torch/__init__.py"
  fails "apt_ext was built for torch $(torch_version | cut -d. -f1,2) and found torch 2.12.1; rebuild it: " "$venv/bin/python" -P -c "import apt_ext"
  "$venv/bin/python" -P -c '
try:
    import apt_ext
except ImportError:
    assert "apt_ext/_C" not in open("/proc/self/maps").read()'
}

sdist() {
  borrow
  rm -rf "$work/dist"
  (cd "$tree" && "$python" setup.py -q sdist -d "$work/dist") >>"$log" 2>&1
  # Unpacked under the one name, so that what other cases compiled counts; a source or a header it lacks is missed all the same.
  find "$tree" -mindepth 1 -maxdepth 1 ! -name build -exec rm -rf {} +
  tar -x --strip-components=1 -C "$tree" -f "$work"/dist/*.tar.gz
  pip wheel --no-deps -w "$work/dist" "$tree"
  pip install "$work"/dist/*.whl
  works "$(torch_version)"
  bare
  pip install --no-deps "$work"/dist/*.whl
  fails "apt_ext needs torch 2.9 or newer, which is not installed: python -m pip install torch" "$venv/bin/python" -P -c 'import apt_ext'
}

# -- from the index ----------------------------------------------------------------------------------------------------

fresh() {
  bare
  pip install "$torch"
  pip install "$tree"
  works "${torch#*==}"
  [ "$(grep -c "Downloading.*torch-\|Using cached torch-\|Processing.*torch-" "$log")" -le 1 ]
}

absent() {
  bare
  echo "$torch" >"$work/constraint"
  PIP_CONSTRAINT=$work/constraint PIP_BUILD_CONSTRAINT=$work/constraint pip install "$tree"
  works "${torch#*==}"
}

uv() {
  bare
  pip install uv "$torch" "setuptools>=77" ninja safetensors tqdm
  "$venv/bin/uv" pip install --offline --python "$venv/bin/python" "$tree" >>"$log" 2>&1
  works "${torch#*==}"
}

# -- running them ------------------------------------------------------------------------------------------------------

[ $# -gt 0 ] || set -- offline
case $1 in
offline)
  set -- $offline
  export CXXFLAGS="${CXXFLAGS:-} -O0" # in half the time: how it installs is the question, and what `make test` runs is optimised
  ;;
all) set -- $offline $online ;;
esac
for name; do
  case " $offline $online " in *" $name "*) ;; *) echo "no such case: $name (offline, all, or some of: $offline $online)" >&2; exit 1 ;; esac
done

mkdir -p "$work"
make_template
rm -rf "$tree.new"
mkdir "$tree.new"
if [ -e .git ]; then git ls-files -co --exclude-standard; else find . -type f -not -path './build/*' -not -path './demo-output/*' -not -path './.*/*'; fi |
  tar -c -T - 2>/dev/null | tar -x -C "$tree.new"
[ ! -d "$tree/build" ] || mv "$tree/build" "$tree.new/"
rm -rf "$tree"
mv "$tree.new" "$tree"

for name; do
  started=$SECONDS
  # A shell of its own, in which a failure ends the case; and none that tests for failure, in which it would not.
  set +e
  (
    set -e
    case " $offline " in *" $name "*) no_index ;; esac
    "$name"
  )
  status=$?
  set -e
  if [ $status != 0 ]; then
    tail -n 40 "$log" >&2
    echo "install: $name failed; all it said is in $log" >&2
    exit 1
  fi
  echo "install: $name ($((SECONDS - started))s)"
done
