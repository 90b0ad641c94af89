#!/bin/sh
# Gives the app's identity its rights in the database, as whoever is signed in: azd runs it after it has provisioned.
# Needs go-sqlcmd, and a sign-in by `azd auth login` or `az login`; the Azure CLI only if the firewall is in the way.
set -eu
cd "$(dirname "$0")/../.."
# The products to try things out with are made unless it is false; and never where SalesLT.Product exists.
: "${SAMPLE_CATALOGUE:=true}"
sample=sqlserver.sql
if [ "$SAMPLE_CATALOGUE" = false ]; then
  sample=
fi

run() {
  sqlcmd -S "$SQL_SERVER" -d "$SQL_DATABASE" --authentication-method ActiveDirectoryDefault -b -l 60 "$@" 2>&1
}

all() {
  { [ -z "$sample" ] || run -i sql/sqlserver.sql; } &&
    run -i sql/sqlserver-access.sql &&
    run -i sql/sqlserver-identity.sql -v Name="$APP_IDENTITY_NAME" ClientId="$APP_IDENTITY_CLIENT_ID"
}

manual() {
  echo "$1 Until these have run, the app can not read the database:" >&2
  for file in ${sample:+"$sample"} sqlserver-access.sql "sqlserver-identity.sql -v Name=$APP_IDENTITY_NAME ClientId=$APP_IDENTITY_CLIENT_ID"; do
    echo "  sqlcmd -S $SQL_SERVER -d $SQL_DATABASE --authentication-method ActiveDirectoryDefault -b -i sql/$file" >&2
  done
}

if [ "$SQL_PRIVATE" = true ]; then
  manual "The database is on the private network only. Run this from within it."
  exit 0
fi
if ! command -v sqlcmd >/dev/null; then
  manual "sqlcmd is missing: https://learn.microsoft.com/sql/tools/sqlcmd/go-sqlcmd-utility."
  exit 1
fi

if said=$(all); then
  echo "The app's identity has its rights in $SQL_DATABASE."
  exit 0
fi
# The server's refusal names the address that it saw.
address=$(printf '%s' "$said" | sed -n "s/.*IP address '\([0-9.]*\)'.*/\1/p" | head -n 1)
if [ -z "$address" ]; then
  printf '%s\n' "$said" >&2
  exit 1
fi
echo "The firewall is opened for $address while this runs."
rule="hook-$$"
close() {
  az sql server firewall-rule delete --only-show-errors --subscription "$AZURE_SUBSCRIPTION_ID" \
    --resource-group "$AZURE_RESOURCE_GROUP" --server "$SQL_SERVER_NAME" --name "$rule" ||
    echo "Look whether the firewall rule $rule of $SQL_SERVER_NAME is still there, and delete it." >&2
}
# Before there is one: it may be made, and this stopped, before anything is heard of it. Not every sh runs what EXIT says
# when a signal ends it.
trap close EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
az sql server firewall-rule create --only-show-errors --output none --subscription "$AZURE_SUBSCRIPTION_ID" \
  --resource-group "$AZURE_RESOURCE_GROUP" --server "$SQL_SERVER_NAME" --name "$rule" --start-ip-address "$address" --end-ip-address "$address"
# A rule can take five minutes to have effect.
for attempt in 1 2 3 4 5 6 7 8 9 10 11; do
  if said=$(all); then
    echo "The app's identity has its rights in $SQL_DATABASE."
    exit 0
  fi
  echo "Not yet ($attempt of 11)."
  sleep 30
done
printf '%s\n' "$said" >&2
exit 1
