# Gives the app's identity its rights in the database, as whoever is signed in: azd runs it after it has provisioned.
# Needs go-sqlcmd, and a sign-in by `azd auth login` or `az login`; the Azure CLI only if the firewall is in the way.
# The same as postprovision.sh, for Windows.
$ErrorActionPreference = 'Stop'
$PSNativeCommandUseErrorActionPreference = $false
Set-Location (Join-Path $PSScriptRoot '../..')

$identity = @("Name=$env:APP_IDENTITY_NAME", "ClientId=$env:APP_IDENTITY_CLIENT_ID")
# The products to try things out with are made unless it is false; and never where SalesLT.Product exists.
$sample = @(if ($env:SAMPLE_CATALOGUE -ne 'false') { 'sqlserver.sql' })
$connection = @('-S', $env:SQL_SERVER, '-d', $env:SQL_DATABASE, '--authentication-method', 'ActiveDirectoryDefault', '-b')

function Invoke-All {
  foreach ($file in $sample + 'sqlserver-access.sql' + 'sqlserver-identity.sql') {
    $arguments = @('-i', "sql/$file")
    if ($file -eq 'sqlserver-identity.sql') { $arguments += @('-v') + $identity }
    $said = & sqlcmd @connection -l 60 @arguments 2>&1 | Out-String
    if ($LASTEXITCODE -ne 0) { return $said }
  }
  return $null
}

function Write-Manual($reason) {
  [Console]::Error.WriteLine("$reason Until these have run, the app can not read the database:")
  foreach ($file in $sample + 'sqlserver-access.sql' + "sqlserver-identity.sql -v $identity") {
    [Console]::Error.WriteLine("  sqlcmd $connection -i sql/$file")
  }
}

if ($env:SQL_PRIVATE -eq 'true') {
  Write-Manual 'The database is on the private network only. Run this from within it.'
  exit 0
}
if (-not (Get-Command sqlcmd -ErrorAction SilentlyContinue)) {
  Write-Manual 'sqlcmd is missing: https://learn.microsoft.com/sql/tools/sqlcmd/go-sqlcmd-utility.'
  exit 1
}

$said = Invoke-All
if ($null -eq $said) {
  Write-Output "The app's identity has its rights in $env:SQL_DATABASE."
  exit 0
}
# The server's refusal names the address that it saw.
if ($said -notmatch "IP address '([0-9.]+)'") {
  [Console]::Error.WriteLine($said)
  exit 1
}
$address = $Matches[1]
Write-Output "The firewall is opened for $address while this runs."
$rule = @('--subscription', $env:AZURE_SUBSCRIPTION_ID, '--resource-group', $env:AZURE_RESOURCE_GROUP, '--server', $env:SQL_SERVER_NAME, '--name', "hook-$PID")
try {
  & az sql server firewall-rule create --only-show-errors --output none @rule --start-ip-address $address --end-ip-address $address
  # A rule can take five minutes to have effect.
  $attempts = if ($LASTEXITCODE -eq 0) { 1..11 }
  foreach ($attempt in $attempts) {
    $said = Invoke-All
    if ($null -eq $said) { break }
    Write-Output "Not yet ($attempt of 11)."
    Start-Sleep -Seconds 30
  }
} finally {
  & az sql server firewall-rule delete --only-show-errors @rule
}
if ($null -ne $said) {
  [Console]::Error.WriteLine($said)
  exit 1
}
Write-Output "The app's identity has its rights in $env:SQL_DATABASE."
