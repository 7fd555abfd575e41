#!/bin/sh
# Paints one photo in the style of another; see usage() or the README.
# The first use makes an environment in .venv beside this file.
set -eu

usage() {
    cat <<'END'
usage: sh run.sh CONTENT STYLE [OUTDIR] [flags for deepstyle.py ...]
       sh run.sh CONTENT STYLE STYLE ... OUTDIR [flags for deepstyle.py ...]
       sh run.sh --setup
       sh run.sh --describe PICTURE
       sh run.sh --info

CONTENT and STYLE are pictures, looked for as given and then in images/.
The results are OUTDIR/result_image_at_iteration_N.png (OUTDIR: result_image/).
CONTENT may be a folder of photos: then they are in OUTDIR/PHOTO/ for each.
STYLE may be a folder of styles: OUTDIR/STYLE/, or OUTDIR/PHOTO/STYLE/.
--setup only makes the environment and prints the path of its interpreter.
--describe prints how a picture was made, and a command that makes it again.
--info prints what the report of a bug needs. It installs nothing.
DEEPSTYLE_PYTHON names the Python interpreter to use (3.10 to 3.13).
The flags are in docs/flags.md; "$(sh run.sh --setup)" deepstyle.py --help prints them.
END
}

say() { printf '%s\n' "run.sh: $*" >&2; }

# The folder of this file itself, if it is called by a symbolic link. (macOS has had no readlink -f for long.)
self=$0
while [ -L "$self" ]; do
    target=$(readlink "$self")
    case $target in
        /*) self=$target ;;
        *) self=$(dirname -- "$self")/$target ;;
    esac
done
here=$(CDPATH='' cd -- "$(dirname -- "$self")" && pwd)
if [ "$here" = "$(pwd)" ]; then from_here=; else from_here=$here/; fi # the folder's own files, as a person names them
venv=$here/.venv
unfinished=$here/.venv-unfinished # there while an installation is under way: what it has said

# The interpreter in the environment $1; on Windows (Git Bash) it is in Scripts.
interpreter_of() {
    if [ -e "$1/Scripts/python.exe" ]; then printf '%s\n' "$1/Scripts/python.exe"; else printf '%s\n' "$1/bin/python"; fi
}

# Whether interpreter $1 has every package of requirements.txt, in a version that it allows.
# It reads the packages' records and imports none, so it answers at once.
has_packages() {
    "$1" - "$here/requirements.txt" >/dev/null 2>&1 <<'END'
import sys
sys.path[:] = filter(None, sys.path)  # not the folder that the command is given in, whatever is there
from importlib.metadata import version
from packaging.requirements import Requirement
for line in open(sys.argv[1]).read().splitlines():
    requirement = Requirement(line)
    if not requirement.specifier.contains(version(requirement.name)):
        sys.exit(1)
END
}

supported() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

# Sets $base: the interpreter that .venv is made with.
find_base() {
    for base in ${DEEPSTYLE_PYTHON:+"$DEEPSTYLE_PYTHON"} python3 python3.13 python3.12 python3.11 python3.10 python; do
        if supported "$base"; then return; fi
        if [ -n "${DEEPSTYLE_PYTHON:-}" ]; then
            say "DEEPSTYLE_PYTHON is '$base', which is no Python 3.10 to 3.13"
            exit 2
        fi
    done
    say "no Python 3.10 to 3.13 was found: install one, or name it in DEEPSTYLE_PYTHON"
    exit 1
}

# Whether .venv is finished, has everything, and comes from DEEPSTYLE_PYTHON if that is set.
venv_is_ready() {
    [ ! -e "$unfinished" ] && has_packages "$(interpreter_of "$venv")" || return 1
    [ -z "${DEEPSTYLE_PYTHON:-}" ] || [ "$(origin "$DEEPSTYLE_PYTHON")" = "$(origin "$(interpreter_of "$venv")")" ]
}

origin() { "$1" -c 'import sys; print(sys.base_prefix)' 2>/dev/null; }

install_packages() {
    say "installing what it needs, once: a few minutes, over 2 GB on the disk"
    clear=
    if [ -e "$unfinished" ] || [ -n "${DEEPSTYLE_PYTHON:-}" ] || ! [ -x "$(interpreter_of "$venv")" ]; then clear=--clear; fi
    trap 'say "interrupted; the same command installs it again"; exit 130' INT
    "$base" -m venv $clear "$venv" >"$unfinished" 2>&1 || {
        say "'$base -m venv' failed; on Debian and Ubuntu: apt install python3-venv"
        say "what it said is in $unfinished"
        exit 1
    }
    # On a machine with an NVIDIA GPU, TensorFlow's extra brings the CUDA libraries it needs.
    extra=
    if nvidia-smi >/dev/null 2>&1; then extra='[and-cuda]'; fi
    sed "s/^tensorflow/&$extra/" "$here/requirements.txt" >"$venv/requirements.txt"
    { pip_install 2>&1 || printf '%s\n' "$pip_failed"; } | follow_pip || {
        say "the installation failed: $(why_pip_failed)"
        say "all that pip said is in $unfinished"
        say "the same command tries it again"
        exit 1
    }
    trap - INT
    rm -f "$unfinished"
    say "installed in $venv"
}

pip_failed='pip has failed' # a line behind those of pip
pip_install() {
    "$(interpreter_of "$venv")" -m pip install --progress-bar off --no-color --disable-pip-version-check \
        -r "$venv/requirements.txt"
}

# Keeps pip's lines in $unfinished. A terminal sees what it is at, in a line that changes.
follow_pip() {
    trap '' INT # pip ends, and then this
    status=0 shows=
    if [ -t 2 ] && [ "${TERM:-dumb}" != dumb ]; then shows=yes; fi
    while IFS= read -r line; do
        printf '%s\n' "$line" >>"$unfinished"
        case $line in
            "$pip_failed") status=1 ;;
            *Downloading*' ('*) # a file's name, or all of its address
                file=${line##*Downloading }
                file=${file%% *}
                file=${file##*/}
                show_step "fetching ${file%%-*} (${line##*(}"
                ;;
            'Installing collected packages:'*) show_step "unpacking, for a minute or two" ;;
        esac
    done
    show_step ''
    return $status
}

# Replaces the line that changes; with nothing, takes it away.
show_step() {
    if [ -n "$shows" ]; then printf '\r\033[K%s' "${1:+run.sh: $1}" >&2; fi
}

why_pip_failed() {
    if grep -q 'Retrying (' "$unfinished" && grep -q 'from versions: none' "$unfinished"; then
        printf '%s\n' "the package index cannot be reached"
    else
        grep -i '^error' "$unfinished" | tail -n 1
    fi
}

# Sets $python, if it can: an interpreter other than .venv's that has the packages.
find_ready_python() {
    if [ "${DEEPSTYLE_PYTHON:-}" = "$(interpreter_of "$venv")" ]; then DEEPSTYLE_PYTHON=; fi
    for python in ${DEEPSTYLE_PYTHON:+"$DEEPSTYLE_PYTHON"} ${VIRTUAL_ENV:+"$(interpreter_of "$VIRTUAL_ENV")"}; do
        if has_packages "$python"; then return; fi
    done
    return 1
}

# Sets $python: the interpreter that a run would use, as far as it is installed; else one without the packages.
find_python_as_it_is() {
    if find_ready_python; then return; fi
    python=$(interpreter_of "$venv")
    if supported "$python"; then return; fi
    find_base
    python=$base
}

# Sets $python: an interpreter that has the packages, .venv's if there is no other.
find_python() {
    if find_ready_python; then return; fi
    find_base
    if ! venv_is_ready; then install_packages; fi
    python=$(interpreter_of "$venv")
}

# Sets $picture: $1 as given, or else the picture of that name under images/.
find_picture() {
    picture=$1
    if [ ! -e "$1" ] && [ -f "$here/images/$1" ]; then picture=${from_here}images/$1; fi
}

# Ends unless $picture is there: better before the minutes that an installation takes.
need_picture() {
    if [ ! -e "$picture" ]; then
        say "there is no picture '$picture', neither as given nor in images/"
        exit 2
    fi
}

is_flag() { case $1 in -*) true ;; *) false ;; esac; }

case ${1:-} in
    --setup) find_python; printf '%s\n' "$python"; exit ;;
    --describe | --describe=* | --info | --version) find_python_as_it_is; exec "$python" "$here/deepstyle.py" "$@" ;;
    -h | --help) usage; exit ;;
esac
given=0 # arguments before the first flag; of more than two, the last is OUTDIR
for argument; do
    if is_flag "$argument"; then break; fi
    given=$((given + 1))
done
if [ $# -eq 0 ]; then
    usage >&2
    exit 2
elif [ $given -lt 2 ]; then
    say "name two pictures, CONTENT and STYLE, before any flags; 'sh run.sh --help' says more"
    exit 2
fi
# Every argument moves to the end of the list, as it is passed on: then all are in their order again.
number=0
for argument; do
    number=$((number + 1))
    shift
    find_picture "$argument"
    if [ $number -gt $given ]; then
        set -- "$@" "$argument"
    elif [ $number -le 2 ] || [ $number -lt $given ]; then
        need_picture
        set -- "$@" "$picture"
    elif [ -f "$picture" ]; then
        say "'$argument' is a file, not a folder; behind several styles name OUTDIR"
        exit 2
    elif [ -z "$argument" ]; then
        say "OUTDIR is empty; name a folder"
        exit 2
    else
        set -- "$@" "$argument/"
    fi
    if [ $number -eq $given ] && [ $given -eq 2 ]; then set -- "$@" "${from_here}result_image/"; fi
done
find_python
exec "$python" "$here/deepstyle.py" "$@"
