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

-- All that the service needs, on this one table.
IF DATABASE_PRINCIPAL_ID(N'product_cache_reader') IS NULL
  CREATE ROLE product_cache_reader;
GRANT SELECT, VIEW CHANGE TRACKING ON SalesLT.Product TO product_cache_reader;

-- Then one user, in that role.
--
-- A managed identity (Azure SQL; run as a Microsoft Entra administrator of the
-- server). The name is the app's for a system-assigned identity, the identity's
-- own for a user-assigned one:
--
--   CREATE USER [product-cache] FROM EXTERNAL PROVIDER;
--   ALTER ROLE product_cache_reader ADD MEMBER [product-cache];
--
-- A password:
--
--   CREATE USER product_cache WITH PASSWORD = '...';          -- Azure SQL
--   CREATE LOGIN product_cache WITH PASSWORD = '...';         -- SQL Server: in
--   CREATE USER product_cache FOR LOGIN product_cache;        -- master, then here
--   ALTER ROLE product_cache_reader ADD MEMBER product_cache;
--
-- The SQL trigger of Azure Functions keeps its own state in the database: tables
-- in a schema az_func, which it makes when it starts. If it feeds InvalidateCache,
-- the user in the connection string that function.json names needs that schema,
-- besides the role above. Made beforehand, it is all that user ever gets:
--
--   CREATE SCHEMA az_func AUTHORIZATION [product-cache];      -- in a batch of its own
--   GRANT CREATE TABLE TO [product-cache];                    -- in its own schemas
--
-- Without the trigger (FEED_INTERVAL_MS in its place) none of this is needed.
