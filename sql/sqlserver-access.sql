-- Product lookup: change tracking, and who may read, on SQL Server and Azure SQL.
--
-- Run it once in the database of SalesLT.Product, as its owner (ALTER DATABASE
-- and ALTER TABLE are needed); running it again changes nothing. The service
-- itself only ever reads.

-- What changed is kept for two days: an instance that has not asked for longer
-- treats all that it has cached as stale.
IF NOT EXISTS (SELECT 1 FROM sys.change_tracking_databases WHERE database_id = DB_ID())
  ALTER DATABASE CURRENT SET CHANGE_TRACKING = ON (CHANGE_RETENTION = 2 DAYS, AUTO_CLEANUP = ON);

-- Needs a primary key. Which columns changed is of no interest.
IF NOT EXISTS (SELECT 1 FROM sys.change_tracking_tables WHERE object_id = OBJECT_ID(N'SalesLT.Product'))
  EXEC (N'ALTER TABLE SalesLT.Product ENABLE CHANGE_TRACKING WITH (TRACK_COLUMNS_UPDATED = OFF)');

-- All that the handler needs, on this one table.
IF DATABASE_PRINCIPAL_ID(N'product_cache_reader') IS NULL
  CREATE ROLE product_cache_reader;
GRANT SELECT, VIEW CHANGE TRACKING ON SalesLT.Product TO product_cache_reader;

-- What the SQL trigger of Azure Functions needs besides: it keeps its state in tables
-- that it makes in the schema az_func. That schema belongs to a role: a schema of dbo
-- would lend its rights to what is made in it, and a user's would keep that user from
-- being dropped. Where a trigger has made it already, the role may do as much there.
IF DATABASE_PRINCIPAL_ID(N'product_cache_trigger') IS NULL
  CREATE ROLE product_cache_trigger;
GRANT CREATE TABLE TO product_cache_trigger;
IF SCHEMA_ID(N'az_func') IS NULL
  EXEC (N'CREATE SCHEMA az_func AUTHORIZATION product_cache_trigger');
IF NOT EXISTS (SELECT 1 FROM sys.schemas
               WHERE name = N'az_func' AND principal_id = DATABASE_PRINCIPAL_ID(N'product_cache_trigger'))
  GRANT ALTER, SELECT, INSERT, UPDATE, DELETE ON SCHEMA::az_func TO product_cache_trigger;

-- Then one user, in these roles: in the second only if the trigger feeds InvalidateCache,
-- which reads the same connection string, and not where FEED_INTERVAL_MS takes its place.
--
-- A managed identity (Azure SQL; run as a Microsoft Entra administrator of the
-- server). The name is the app's for a system-assigned identity, the identity's
-- own for a user-assigned one:
--
--   CREATE USER [product-cache] FROM EXTERNAL PROVIDER;
--   ALTER ROLE product_cache_reader ADD MEMBER [product-cache];
--   ALTER ROLE product_cache_trigger ADD MEMBER [product-cache];
--
-- A password:
--
--   CREATE USER product_cache WITH PASSWORD = '...';          -- Azure SQL
--   CREATE LOGIN product_cache WITH PASSWORD = '...';         -- SQL Server: in
--   CREATE USER product_cache FOR LOGIN product_cache;        -- master, then here
--   ALTER ROLE product_cache_reader ADD MEMBER product_cache;
--   ALTER ROLE product_cache_trigger ADD MEMBER product_cache;
