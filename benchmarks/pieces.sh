# Sourced by the plans: their common options, and running one command piece after piece.
#
# Sets out, once, tiny and the array rest (what comes after --) from the plan's arguments; its default for out is given
# first. `pieces COMMAND …` runs `filterfold COMMAND … --stop-after PIECE rest…` until nothing is left to do.

options() {
  out=$1 once=no tiny=no rest=()
  shift
  while [ $# -gt 0 ]; do
    case "$1" in
      --once) once=yes ;;
      --tiny) tiny=yes ;;
      --out) out="${2:?--out needs a folder}"; shift ;;
      --) shift; rest=("$@"); break ;;
      *) echo "${0##*/}: no option $1; see the head of this file" >&2; exit 2 ;;
    esac
    shift
  done
}

# Ends the script with the command's exit code unless all is done: 3 with --once while something is left.
pieces() {
  local code
  while true; do
    code=0
    ${FILTERFOLD:-filterfold} "$@" --stop-after "${PIECE:-9m}" ${rest[@]+"${rest[@]}"} || code=$?
    if [ "$code" -eq 0 ]; then
      return
    elif [ "$code" -ne 3 ] || [ "$once" = yes ]; then
      exit "$code"
    fi
  done
}
