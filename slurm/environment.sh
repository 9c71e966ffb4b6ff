# shellcheck shell=bash
# The environment of a job, sourced by the scripts beside this file once they have `die`: the site file, or else the
# repository's own. The file's status is not checked, a harmless last line can fail; what it should bring is.
# shellcheck disable=SC1090,SC1091 # they are not part of the repository
if [[ ${OPEN_R1_SITE-} && ! -f $OPEN_R1_SITE ]]; then
    die "OPEN_R1_SITE: no such file: $OPEN_R1_SITE"
elif [[ -f ${OPEN_R1_SITE:-slurm/site.sh} ]]; then
    source "${OPEN_R1_SITE:-slurm/site.sh}"
elif [[ -f .venv/bin/activate ]]; then
    source .venv/bin/activate
fi
set +eu +o pipefail # should the file have set them: a wait that a signal ends is no failure
