-- Product lookup: the managed identity of the app as a user of the database, on Azure SQL.
--
-- Run it after sqlserver-access.sql, in the same database, as a Microsoft Entra administrator of the server, with sqlcmd:
-- it takes two variables, Name (the identity's) and ClientId. Running it again changes nothing. infra/hooks runs it.
--
-- The user is made from its client id, which is its SID here. FROM EXTERNAL PROVIDER would look the name up in the
-- directory, for which the server needs a role there if a service principal runs this.
DECLARE @user sysname = QUOTENAME(N'$(Name)');
DECLARE @sid nvarchar(40) = CONVERT(nvarchar(40), CAST(CAST('$(ClientId)' AS uniqueidentifier) AS varbinary(16)), 1);
DECLARE @statement nvarchar(max);

-- One of that name with another SID is a former identity's, which was deleted.
IF EXISTS (SELECT 1 FROM sys.database_principals WHERE name = N'$(Name)' AND sid <> CONVERT(varbinary(85), @sid, 1))
  THROW 50001, 'The database has a user of this name that belongs to another identity. Drop it first.', 1;

IF DATABASE_PRINCIPAL_ID(N'$(Name)') IS NULL
BEGIN
  SET @statement = N'CREATE USER ' + @user + N' WITH SID = ' + @sid + N', TYPE = E';
  EXEC (@statement);
END;

-- What the handler needs, and what the SQL trigger needs besides.
SET @statement = N'ALTER ROLE product_cache_reader ADD MEMBER ' + @user;
EXEC (@statement);
SET @statement = N'ALTER ROLE product_cache_trigger ADD MEMBER ' + @user;
EXEC (@statement);
